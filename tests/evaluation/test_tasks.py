"""Benchmarks: asked as the released scripts ask, scored from the answers, submitted in the official
format, whole or in parts.
"""

import json
import re
import shutil

import pandas
import pytest
from helpers.playground import LETTER, SHORT, make_root

from sparsecut.building import load, save
from sparsecut.cli.main import app
from sparsecut.evaluation.tasks.run import TASKS, parse_tasks, part_of, read_tasks, run_task, table
from sparsecut.experiments.compare import figures, read_runs, stores

PERFECT = {  # what a task says of answers that are all right
    "vqav2:split=val": {"accuracy": 100},
    "gqa": {"accuracy": 100},
    "scienceqa": {"image accuracy": 100, "accuracy": 100},
    "scienceqa:part=image": {"image accuracy": 100, "accuracy": 100},
    "textvqa": {"accuracy": 100},
    "textvqa:ocr=off": {"accuracy": 100},
    "pope": {"F1": 100, "accuracy": 100, "yes": 50},
    "pope:split=popular": {"F1": 100, "accuracy": 100, "yes": 50},
    "mme": {"perception": 400, "cognition": 0},
    "mmbench": {"circular accuracy": 100, "plain accuracy": 100},
    "mmbench_cn:circular=off": {"plain accuracy": 100},
    "seed": {"image": 100, "video": 100, "total": 100},
    "seed:part=video": {"video": 100, "total": 100},
}
ELSEWHERE = ["vqav2", "vqav2:split=test", "vizwiz", "mmvet", "llava_bench"]
PROMPTS = {
    "vqav2": f"is it red 0\n{SHORT}",
    "vqav2:split=val": f"what is it\n{SHORT}",
    "scienceqa": f"Context: N/A\nQuestion: what is it\nOptions: (A) a cat (B) a dog\n{LETTER}",
    "textvqa": f"What is it 0\nReference OCR token: cat, dog\n{SHORT}",
    "textvqa:ocr=off": f"What is it 0\n{SHORT}",
    "mmbench": (
        f"what is it\nA. a cat\nB. a dog\nC. red\n{LETTER}"
    ),  # an option "None" is an empty cell, as for the released script
    "mmbench_cn": (
        "what is it\nA. a cat\nB. a dog\nC."
        " red\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("playground") / "eval")


def read(root, name: str, **more):
    return read_tasks(name, root, **more)[0]


@pytest.mark.parametrize("name", PERFECT)
def test_right_answers_are_all_right_and_wrong_ones_none(root, name):
    chosen = read(root, name)
    right = chosen.task.score(chosen.asked, {q.id: q.reference for q in chosen.asked.questions})
    assert right.main == pytest.approx(PERFECT[name]) and min(right.each.values()) > 0.99
    wrong = chosen.task.score(chosen.asked, {q.id: "neither" for q in chosen.asked.questions})
    assert name.startswith(("pope", "mme")) or not any(
        wrong.main.values()
    )  # POPE reads yes from it
    assert set(wrong.each) == {q.id for q in chosen.asked.questions} == set(right.each)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_answers_that_are_scored_elsewhere_have_no_score_and_a_file(root, name, tmp_path):
    chosen = read(root, name)
    answers = {q.id: f"Two  cats. {q.id}" for q in chosen.asked.questions}
    assert chosen.task.score is None or chosen.task.score(chosen.asked, answers) is None
    (file,) = chosen.task.submit(chosen.asked, answers, tmp_path)
    text = file.read_text()
    if name.startswith("vqav2"):
        rows = json.loads(text)
        assert [row["question_id"] for row in rows] == list(range(6)) and rows[0][
            "answer"
        ] == "2 cats 0"
        assert [row["answer"] for row in rows[4:]] == (
            ["", ""] if name == "vqav2" else ["2 cats 4", "2 cats 5"]
        )
    elif name == "vizwiz":
        assert json.loads(text)[1] == {"image": "VizWiz_test_00000001.jpg", "answer": "2 cats 1"}
    elif name == "mmvet":
        assert json.loads(text) == {"v1_0": "Two  cats. 0", "v1_1": "Two  cats. 1"}
    else:
        assert json.loads(text.splitlines()[0]) | {
            "text": "Two  cats. 0",
            "question_id": 0,
        } == json.loads(text.splitlines()[0])


def test_other_official_files(root, tmp_path):
    pytest.importorskip("openpyxl")
    chosen = read(root, "mmbench")
    (table_file,) = chosen.task.submit(
        chosen.asked, {q.id: "B" for q in chosen.asked.questions}, tmp_path
    )
    rows = pandas.read_excel(table_file)
    assert list(rows) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows["index"].tolist()[:3] == [1, 1000001, 2000001] and set(rows["prediction"]) == {"B"}
    chosen = read(root, "mme")
    (folder,) = chosen.task.submit(
        chosen.asked, {q.id: "Yes, it\nis" for q in chosen.asked.questions}, tmp_path
    )
    lines = (folder / "artwork.txt").read_text().splitlines()
    assert (
        lines[0] == "0.png\tIs it a cat? Please answer yes or no.\tYes\tYes, it is"
        and len(lines) == 4
    )
    chosen = read(root, "seed")
    (file,) = chosen.task.submit(
        chosen.asked, {q.id: "A" for q in chosen.asked.questions}, tmp_path
    )
    assert json.loads(file.read_text().splitlines()[3]) == {"question_id": "v3", "prediction": "A"}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_the_released_scripts(root, name):
    assert read(root, name).asked.questions[0].text == PROMPTS[name]


def test_rotated_rows_show_the_picture_of_their_question(root):
    shown = {q.id: q.image for q in read(root, "mmbench").asked.questions}
    assert shown["3"] == shown["1000003"] == shown["2000003"] != shown["1"]
    assert read(root, "mmbench").asked.questions[3].text.startswith("it is red\nwhat is it\nA.")


def test_a_table_without_answers_is_for_the_server(root, tmp_path):
    pytest.importorskip("openpyxl")
    rows = pandas.read_table(root / "mmbench" / "mmbench_dev_20230712.tsv", dtype=str).drop(
        columns="answer"
    )
    (tmp_path / "mmbench").mkdir()
    rows.to_csv(tmp_path / "mmbench" / "mmbench_test_20230712.tsv", sep="\t", index=False)
    chosen = read(tmp_path, "mmbench:split=test")
    answers = {q.id: "A" for q in chosen.asked.questions}
    assert chosen.task.score(chosen.asked, answers) is None and chosen.task.submit(
        chosen.asked, answers, tmp_path
    )


def test_every_task_is_asked_and_leaves_what_it_promises(root, tiny, tmp_path):
    results = [run_task(*tiny, one, tmp_path, max_new_tokens=3) for one in read_tasks("all", root)]
    assert [one["task"] for one in results] == list(TASKS)
    for one in results:
        folder = tmp_path / one["task"]
        assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(one))
        assert all((folder / file).exists() for file in one["submission"])
        assert one["main"] or (one["submission"] and one["share_right"] is None)
        assert (
            one["prompt_template"]
            and one["question_files"]
            and one["decoding"]["max_new_tokens"] == 3
        )
        lines = [
            json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()
        ]
        assert len(lines) == one["num_examples"] and all(
            (line["correct"] is None) == (one["main"] is None) for line in lines
        )
    text = table(results)
    assert "to be scored elsewhere: vizwiz_submission.json" in text and len(text.splitlines()) == 13


def test_parts_together_are_the_whole_and_an_interrupted_run_goes_on(root, tiny, tmp_path):
    chosen = read(root, "pope")
    whole = run_task(*tiny, chosen, tmp_path / "whole", max_new_tokens=3)
    for number in (2, 0, 1):
        result = run_task(
            *tiny, chosen, tmp_path / "parts", part=(number, 3), batch_size=2, max_new_tokens=3
        )
        assert (result is None) == (number != 1)

    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(*tiny, chosen, tmp_path / "again", batch_size=3, max_new_tokens=3, progress=stop)
    assert not (tmp_path / "again" / "pope" / "result.json").exists()
    again = run_task(*tiny, chosen, tmp_path / "again", max_new_tokens=3)
    files = [
        (tmp_path / name / "pope" / "predictions.jsonl").read_text()
        for name in ("whole", "parts", "again")
    ]
    assert files[0] == files[1] == files[2]
    for other in (result, again):
        assert {k: v for k, v in other.items() if k != "batch_size"} == {
            k: v for k, v in whole.items() if k != "batch_size"
        }


def test_parts_of_two_models_are_not_put_together(root, tiny, tmp_path):
    chosen = read(root, "vizwiz")
    run_task(*tiny, chosen, tmp_path, part=(0, 2), max_new_tokens=3)
    with pytest.raises(ValueError, match="answered by different models or settings"):
        run_task(*tiny, chosen, tmp_path, part=(1, 2), max_new_tokens=4)
    (tmp_path / "vizwiz" / "part-1-of-2" / "predictions.jsonl").write_text("")
    with pytest.raises(ValueError, match="hold no answer to 2 questions, such as 0"):
        run_task(*tiny, chosen, tmp_path, part=(1, 2), max_new_tokens=3, resume=False)
    with pytest.raises(ValueError, match="too few for 9 processes"):
        run_task(*tiny, chosen, tmp_path, part=(5, 9), max_new_tokens=4)


def test_some_of_the_questions_keep_what_belongs_together(root, tiny, tmp_path):
    for name, units in (("mme", 2), ("mmbench", 3)):
        kept = read(root, name, limit=2).asked.questions
        assert len(kept) == units and len({q.unit for q in kept}) == 1
    chosen = read(root, "vizwiz", limit=1)
    result = run_task(*tiny, chosen, tmp_path, max_new_tokens=3)
    assert (
        result["num_examples"] == 1
        and result["submission"] == []
        and (tmp_path / "vizwiz-limit-1").is_dir()
    )
    assert "no score and no file" in table([result])


def test_worth_between_nothing_and_all_counts_as_much_in_a_comparison(root, tiny, tmp_path):
    save(*tiny, tmp_path / "model")
    asked = load(tmp_path / "model")
    for name in ("one", "two"):
        run_task(*asked, read(root, "vqav2:split=val"), tmp_path / name, max_new_tokens=3)
        file = tmp_path / name / "vqav2-split-val" / "predictions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(
                json.dumps({**line, "correct": 0.3 if name == "one" else 0.9}) + "\n"
                for line in lines
            )
        )
    runs = read_runs([f"{name}={tmp_path / name / 'vqav2-split-val'}" for name in ("one", "two")])
    rows = figures(runs)["runs"]
    assert [rows[name]["share"]["average"]["value"] for name in ("one", "two")] == pytest.approx(
        [0.3, 0.9]
    )
    assert [store.path for store in stores(runs)] == [
        root / "vqav2" / "val2014"
    ]  # the page shows the pictures
    assert (
        runs[0].plan == asked[0].plan
        and runs[0].cost["num_image_tokens"] == asked[1].num_image_tokens
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pop", "no task 'pop' (did you mean 'pope'?)"),
        ("textvqa:oct=off", "no option 'oct' (did you mean 'ocr'?); its options are: ocr=on|off"),
        ("pope:split=advers", "did you mean 'adversarial'"),
        ("gqa:part=all", "its options are: none"),
        ("gqa,gqa", "named twice"),
        ("pope:split=random:split=popular", "says split twice"),
        (" ,", "no task is named"),
    ],
)
def test_names_and_options_are_checked(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_tasks(text)


def test_what_is_missing_or_broken_is_told_before_anything_is_asked(root, tmp_path):
    copy = tmp_path / "eval"
    shutil.copytree(root, copy)
    file = copy / "vizwiz" / "llava_test.jsonl"
    file.write_bytes(
        b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n")
    )  # as an editor may leave it
    assert [q.text for q in read(copy, "vizwiz").asked.questions] == [
        q.text for q in read(root, "vizwiz").asked.questions
    ]
    (copy / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(
        ValueError,
        match=r"llava_pope_test.jsonl line 2: there is no picture COCO_val2014_000000000001.jpg",
    ):
        read(copy, "pope")
    (copy / "pope" / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"pope needs .*coco_pope_popular.json, which is not there; extract LLaVA's eval.zip",
    ):
        read(copy, "gqa,pope")
    (copy / "gqa" / "llava_gqa_testdev_balanced.jsonl").write_text('{"question_id": 1')
    with pytest.raises(ValueError, match=r"llava_gqa_testdev_balanced.jsonl line 1 is not JSON"):
        read(copy, "gqa")
    (copy / "mmbench" / "mmbench_dev_20230712.tsv").write_text("index\tquestion\n1\tx\n")
    with pytest.raises(ValueError, match="has no column A, image"):
        read(copy, "mmbench")
    for content, words in (
        ("", "cannot be read as a table"),
        ("index\tquestion\tA\timage\nx\ty\tz\tw\n", "whose index is 'x'"),
    ):
        (copy / "mmbench" / "mmbench_dev_20230712.tsv").write_text(content)
        with pytest.raises(ValueError, match=rf"mmbench_dev_20230712\.tsv .*{words}"):
            read(copy, "mmbench")
    (copy / "mm-vet" / "llava-mm-vet.jsonl").write_bytes(b"\xff{}")
    with pytest.raises(ValueError, match=r"llava-mm-vet.jsonl line 1 .*UTF-8"):
        read(copy, "mmvet")
    (copy / "scienceqa" / "problems.json").write_text("[]")
    with pytest.raises(ValueError, match="asks problem 0, which is not of the test split"):
        read(copy, "scienceqa")
    (copy / "textvqa" / "TextVQA_0.5.1_val.json").write_text('{"date": 1}')
    with pytest.raises(
        ValueError,
        match=r"files of textvqa below .* are not what they should be \(KeyError: 'data'\)",
    ):
        read(copy, "textvqa")
    with pytest.raises(ValueError, match="there is no folder"):
        read(tmp_path / "none", "gqa")


def test_a_part_is_a_number_of_a_number(monkeypatch):
    assert part_of(None) == (0, 1) and part_of("2/4") == (1, 4)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert part_of(None) == (3, 8)
    for wrong in ("0/4", "5/4", "a", "1/"):
        with pytest.raises(ValueError, match="as 1/4 to 4/4"):
            part_of(wrong)


def test_the_command_prints_scores_and_refuses_half_a_question(root, tiny, tmp_path, capsys):
    save(*tiny, tmp_path / "model")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    base = ["eval", model, "--max-new-tokens", "3", "--device", "cpu"]
    asks = [*base, "--tasks", "pope:split=random,vizwiz", "--root", str(root), "--out", out]
    assert (
        run(asks[:-2])
        == "--tasks needs --out, a folder for answers and scores, where an interrupted run goes on"
    )
    assert "give --data, a file of questions, or --tasks" in run(base)
    assert "--images cannot go with --tasks" in run([*asks, "--images", "x"])
    assert run([*asks, "--dtype", "bf16"]).startswith("--dtype is 'bf16'")
    assert "belong to --tasks" in run([*base, "--data", "x.json", "--part", "1/2"])
    assert not (tmp_path / "out").exists()
    assert (
        run([*asks, "--part", "1/2"]) is None
        and "part 1 of 2 is answered" in capsys.readouterr().out
    )
    assert run([*asks, "--part", "2/2"]) is None
    printed, told = capsys.readouterr()
    assert "vizwiz is answered: " in told
    assert (
        "pope:split=random" in printed
        and "to be scored elsewhere: vizwiz_submission.json" in printed
    )
    assert (tmp_path / "out" / "pope-split-random" / "result.json").is_file()
    assert "made with another weights" in run(
        [*asks[:-1], out, "--part", "1/2", "--dtype", "bfloat16"]
    )
    assert run([*asks[:-1], out + "-half", "--dtype", "bfloat16"]) is None


def run(arguments: list[str]) -> str | None:
    """The sentence with which a command ends, if it does."""
    try:
        app(args=arguments, standalone_mode=False)
    except ValueError as error:
        return str(error)
    return None
