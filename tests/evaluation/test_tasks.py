"""Benchmark tasks ask as the released scripts do, score answers, and write official submissions,
in one process or in parts.
"""

import json
import re
import shutil

import pandas
import pytest
from helpers.playground import LETTER, SHORT, make_root, write_image
from helpers.tiny import tiny_model

from sparsecut.building import load, save
from sparsecut.cli.main import app
from sparsecut.evaluation.tasks.run import (
    TASKS,
    format_results,
    parse_part,
    parse_tasks,
    read_tasks,
    run_task,
)
from sparsecut.experiments.compare import compare_runs, find_images, read_runs
from sparsecut.schema import UserError

PERFECT_SCORES = {
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
PROMPTS = {
    "vqav2": f"is it red 0\n{SHORT}",
    "vqav2:split=val": f"what is it\n{SHORT}",
    "scienceqa": f"Context: N/A\nQuestion: what is it\nOptions: (A) a cat (B) a dog\n{LETTER}",
    "textvqa": f"What is it 0\nReference OCR token: cat, dog\n{SHORT}",
    "textvqa:ocr=off": f"What is it 0\n{SHORT}",
    # Option D, "None", is an empty cell, as for the released script.
    "mmbench": f"what is it\nA. a cat\nB. a dog\nC. red\n{LETTER}",
    "mmbench_cn": (
        "what is it\nA. a cat\nB. a dog\nC."
        " red\n\u8bf7\u76f4\u63a5\u56de\u7b54\u9009\u9879\u5b57\u6bcd\u3002"
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("playground") / "eval")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    save(*tiny_model(), folder)
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    """(model, processor) that tests leave as they are."""
    return load(saved)


def read_task(root, name: str, **settings):
    (selected,) = read_tasks(name, root, **settings)
    return selected


def read_records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# ---- prompts and scores


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_the_released_scripts(root, name):
    assert read_task(root, name).data.questions[0].text == PROMPTS[name]


def test_rotated_rows_show_the_image_of_their_question(root):
    questions = {q.id: q for q in read_task(root, "mmbench").data.questions}
    images = {key: question.image for key, question in questions.items()}
    assert images["3"] == images["1000003"] == images["2000003"] != images["1"]
    assert questions["2"].text.startswith("it is red\nwhat is it\nA.")


@pytest.mark.parametrize("name", PERFECT_SCORES)
def test_right_answers_get_the_full_score_and_wrong_ones_none(root, name):
    selected = read_task(root, name)
    questions = selected.data.questions
    right = selected.task.score(selected.data, {q.id: q.reference for q in questions})
    assert right.main == pytest.approx(PERFECT_SCORES[name])
    assert min(right.per_question.values()) > 0.99
    wrong = selected.task.score(selected.data, dict.fromkeys([q.id for q in questions], "neither"))
    if not name.startswith(("pope", "mme")):  # POPE reads yes from it
        assert not any(wrong.main.values())
    assert list(right.per_question) == list(wrong.per_question) == [q.id for q in questions]


# ---- submissions


def submit(root, name: str, answer: str, folder):
    """The submission of one answer to every question, which holds `{id}`."""
    selected = read_task(root, name)
    answers = {q.id: answer.format(id=q.id) for q in selected.data.questions}
    score = selected.task.score(selected.data, answers) if selected.task.score else None
    (path,) = selected.task.submit(selected.data, answers, folder)
    return path, score


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("vqav2", ["2 cats 0", "2 cats 1", "2 cats 2", "2 cats 3", "", ""]),
        ("vqav2:split=test", [f"2 cats {i}" for i in range(6)]),
    ],
)
def test_vqav2_submits_an_answer_to_every_question_of_the_test_split(root, name, answers, tmp_path):
    path, score = submit(root, name, "Two  cats. {id}", tmp_path)
    rows = json.loads(path.read_text())
    assert score is None
    assert [row["question_id"] for row in rows] == list(range(6))
    assert [row["answer"] for row in rows] == answers


def test_submissions_of_benchmarks_that_are_scored_elsewhere(root, tmp_path):
    path, score = submit(root, "vizwiz", "Two  cats. {id}", tmp_path)
    row = json.loads(path.read_text())[1]
    assert score is None
    assert row == {"image": "VizWiz_test_00000001.jpg", "answer": "2 cats 1"}
    path, score = submit(root, "mmvet", "Two  cats. {id}", tmp_path)
    assert score is None
    assert json.loads(path.read_text()) == {"v1_0": "Two  cats. 0", "v1_1": "Two  cats. 1"}
    path, score = submit(root, "llava_bench", "Two  cats. {id}", tmp_path)
    row = json.loads(path.read_text().splitlines()[0])
    assert score is None
    assert (row["question_id"], row["text"]) == (0, "Two  cats. 0")


def test_submissions_of_benchmarks_that_are_scored_here(root, tmp_path):
    path, _ = submit(root, "mme", "Yes, it\nis", tmp_path)
    lines = (path / "artwork.txt").read_text().splitlines()
    assert lines[0] == "0.png\tIs it a cat? Please answer yes or no.\tYes\tYes, it is"
    assert len(lines) == 4
    path, _ = submit(root, "seed", "A", tmp_path)
    row = json.loads(path.read_text().splitlines()[3])
    assert row == {"question_id": "v3", "prediction": "A"}


def test_mmbench_submits_a_table(root, tmp_path):
    pytest.importorskip("openpyxl")
    path, _ = submit(root, "mmbench", "B", tmp_path)
    table = pandas.read_excel(path)
    columns = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert list(table) == columns
    assert table["index"].tolist()[:3] == [1, 1000001, 2000001]
    assert set(table["prediction"]) == {"B"}
    # The test split has no answers.
    rows = pandas.read_table(root / "mmbench" / "mmbench_dev_20230712.tsv", dtype=str)
    test_file = tmp_path / "mmbench" / "mmbench_test_20230712.tsv"
    test_file.parent.mkdir()
    rows.drop(columns="answer").to_csv(test_file, sep="\t", index=False)
    path, score = submit(tmp_path, "mmbench:split=test", "A", tmp_path)
    assert score is None
    assert path.is_file()


# ---- runs


def test_every_task_runs_and_writes_what_it_promises(root, saved, loaded, tmp_path):
    results = []
    for selected in read_tasks("all", root):
        results.append(run_task(*loaded, selected, tmp_path, max_new_tokens=3))
    assert [result["task"] for result in results] == list(TASKS)
    for result in results:
        folder = tmp_path / result["task"]
        assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))
        assert all((folder / name).exists() for name in result["submission"])
        assert result["model"] == str(saved)  # where a comparison finds the plan
        assert result["prompt_template"]
        assert result["question_files"]
        assert result["decoding"]["max_new_tokens"] == 3
        is_scored = result["main"] is not None
        assert is_scored or result["submission"]
        assert is_scored == (result["share_right"] is not None)
        records = read_records(folder)
        assert len(records) == result["num_examples"]
        assert all((record["correct"] is not None) == is_scored for record in records)
    text = format_results(results)
    assert "elsewhere: vizwiz_submission.json" in text
    assert len(text.splitlines()) == 1 + len(TASKS)


def test_parts_together_are_the_whole(root, loaded, tmp_path):
    selected = read_task(root, "pope")
    whole = run_task(*loaded, selected, tmp_path / "whole", max_new_tokens=3)
    settings = {"batch_size": 2, "max_new_tokens": 3}
    results = []
    for index in (2, 0, 1):
        results.append(run_task(*loaded, selected, tmp_path / "parts", part=(index, 3), **settings))
    assert results[:2] == [None, None]
    assert results[2] == {**whole, "batch_size": 2}
    assert read_records(tmp_path / "parts" / "pope") == read_records(tmp_path / "whole" / "pope")


def test_an_interrupted_task_resumes(root, loaded, tmp_path):
    selected = read_task(root, "mme")

    def stop(done, total):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(*loaded, selected, tmp_path, batch_size=3, max_new_tokens=3, progress=stop)
    assert not (tmp_path / "mme" / "result.json").exists()
    counts = []

    def note(done, total):
        counts.append(done)

    resumed = run_task(*loaded, selected, tmp_path, max_new_tokens=3, progress=note)
    assert counts[0] == 6
    whole = run_task(*loaded, selected, tmp_path / "whole", max_new_tokens=3)
    assert resumed == whole
    assert read_records(tmp_path / "mme") == read_records(tmp_path / "whole" / "mme")


def test_parts_that_do_not_belong_together_are_refused(root, loaded, tmp_path):
    selected = read_task(root, "vizwiz")
    run_task(*loaded, selected, tmp_path, part=(0, 2), max_new_tokens=3)
    with pytest.raises(UserError, match="different models or settings"):
        run_task(*loaded, selected, tmp_path, part=(1, 2), max_new_tokens=4)
    (tmp_path / "vizwiz" / "part-1-of-2" / "predictions.jsonl").write_text("")
    with pytest.raises(UserError, match="no answer to 2 questions, such as 0"):
        run_task(*loaded, selected, tmp_path, part=(1, 2), max_new_tokens=3, resume=False)
    with pytest.raises(UserError, match=r"vizwiz has 3 questions.*9"):
        run_task(*loaded, selected, tmp_path, part=(5, 9), max_new_tokens=4)


def test_parts_about_other_images_are_refused(root, loaded, tmp_path):
    shutil.copytree(root, tmp_path / "root")
    selected = read_task(tmp_path / "root", "pope")
    run_task(*loaded, selected, tmp_path / "out", part=(0, 2), max_new_tokens=2)
    name = selected.data.questions[0].image
    file = selected.data.images.find_file(name)
    write_image(file, 99)
    with pytest.raises(UserError, match=name):
        run_task(*loaded, selected, tmp_path / "out", part=(1, 2), max_new_tokens=2)
    assert not (tmp_path / "out" / "pope" / "result.json").exists()


def test_a_selection_keeps_units_together_and_submits_nothing(root, loaded, tmp_path):
    for name, size in (("mme", 2), ("mmbench", 3)):
        questions = read_task(root, name, limit=2).data.questions
        assert len(questions) == size
        assert len({question.unit for question in questions}) == 1
    selected = read_task(root, "vizwiz", limit=1)
    result = run_task(*loaded, selected, tmp_path, max_new_tokens=3)
    assert result["num_examples"] == 1
    assert result["submission"] == []
    assert (tmp_path / "vizwiz-limit-1").is_dir()
    assert "no score" in format_results([result])


def test_scores_between_zero_and_one_are_compared_as_they_are(root, tmp_path):
    model = tiny_model()  # on no disk, so that no cost is counted
    folders = {}
    for name, score in (("one", 0.3), ("two", 0.9)):
        selected = read_task(root, "vqav2:split=val")
        run_task(*model, selected, tmp_path / name, max_new_tokens=3)
        folders[name] = tmp_path / name / selected.label
        lines = [json.dumps({**r, "correct": score}) for r in read_records(folders[name])]
        (folders[name] / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    runs = read_runs([f"{name}={folder}" for name, folder in folders.items()])
    rows = compare_runs(runs)["runs"]
    assert rows["one"]["share"]["average"]["value"] == pytest.approx(0.3)
    assert rows["two"]["share"]["average"]["value"] == pytest.approx(0.9)
    assert [store.path for store in find_images(runs)] == [root / "vqav2" / "val2014"]


# ---- mistakes


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("pop", "'pop' (did you mean 'pope'?)"),
        ("textvqa:oct=off", "'oct' (did you mean 'ocr'?); its options are: ocr=on|off"),
        ("pope:split=advers", "'advers' (did you mean 'adversarial'?)"),
        ("gqa:part=all", "'part'; its options are: none"),
        ("gqa,gqa", "gqa is named twice"),
        ("pope:split=random:split=popular", "split twice"),
        (" ,", "no task"),
    ],
)
def test_names_and_options_are_checked(text, facts):
    with pytest.raises(UserError, match=re.escape(facts)):
        parse_tasks(text)


def test_a_part_is_a_number_and_the_number_of_parts(monkeypatch):
    assert parse_part(None) == (0, 1)
    assert parse_part("2/4") == (1, 4)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse_part(None) == (3, 8)
    for wrong in ("0/4", "5/4", "a", "1/"):
        with pytest.raises(UserError, match=f"--part is '{wrong}'"):
            parse_part(wrong)


def test_a_missing_file_or_image_is_named_before_any_answer(root, tmp_path):
    copy = tmp_path / "eval"
    shutil.copytree(root / "pope", copy / "pope")
    (copy / "pope" / "val2014" / "COCO_val2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"llava_pope_test.jsonl line 2: .*000000000001.jpg"):
        read_task(copy, "pope")
    (copy / "pope" / "coco" / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match=r"pope needs .*coco_pope_popular.json.*eval.zip"):
        read_task(copy, "pope")
    with pytest.raises(UserError, match=r"no folder .*none"):
        read_task(tmp_path / "none", "gqa")


@pytest.mark.parametrize(
    ("name", "file", "content", "facts"),
    [
        (
            "gqa",
            "gqa/llava_gqa_testdev_balanced.jsonl",
            b'{"a": 1',
            r"balanced.jsonl line 1: .*JSON",
        ),
        ("mmvet", "mm-vet/llava-mm-vet.jsonl", b"\xff{}", r"mm-vet.jsonl line 1: .*UTF-8"),
        ("mmvet", "mm-vet/llava-mm-vet.jsonl", b'{"text": 1}', "question_id, image"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", b"index\tquestion\n1\tx\n", "A, image"),
        ("mmbench", "mmbench/mmbench_dev_20230712.tsv", b"", "cannot be read as a table"),
        (
            "mmbench",
            "mmbench/mmbench_dev_20230712.tsv",
            b"index\tquestion\tA\timage\nx\ty\tz\tw\n",
            r"20230712\.tsv .*index is 'x'",
        ),
        ("scienceqa", "scienceqa/problems.json", b"[]", "problem 0.*test split"),
        (
            "textvqa",
            "textvqa/TextVQA_0.5.1_val.json",
            b'{"date": 1}',
            r"textvqa .*KeyError: 'data'",
        ),
    ],
)
def test_a_broken_file_is_named(root, tmp_path, name, file, content, facts):
    folder = file.partition("/")[0]
    shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=facts):
        read_task(tmp_path, name)


def test_a_file_may_have_a_byte_order_mark_and_windows_line_ends(root, tmp_path):
    shutil.copytree(root / "vizwiz", tmp_path / "vizwiz")
    file = tmp_path / "vizwiz" / "llava_test.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    questions = read_task(root, "vizwiz").data.questions
    assert [q.text for q in read_task(tmp_path, "vizwiz").data.questions] == [
        q.text for q in questions
    ]


# ---- the command


def run_command(arguments: list[str]) -> str | None:
    """The error with which a command ends, if it does."""
    try:
        app(args=arguments, standalone_mode=False)
    except UserError as error:
        return str(error)
    return None


def test_the_command_refuses_options_that_do_not_belong_together(root, saved, tmp_path):
    base = ["eval", str(saved), "--device", "cpu"]
    tasks = [*base, "--tasks", "pope:split=random,vizwiz", "--root", str(root)]
    out = ["--out", str(tmp_path / "out")]
    assert "--out" in run_command(tasks)
    for option in ("--data", "--tasks"):
        assert option in run_command(base)
    assert "--images" in run_command([*tasks, *out, "--images", "x"])
    assert "--dtype is 'bf16'" in run_command([*tasks, *out, "--dtype", "bf16"])
    assert "--part" in run_command([*base, "--data", "x.json", "--part", "1/2"])
    assert not (tmp_path / "out").exists()


def test_the_command_asks_parts_and_prints_scores(root, saved, tmp_path, capsys):
    out = tmp_path / "out"
    asks = ["eval", str(saved), "--device", "cpu", "--max-new-tokens", "3", "--root", str(root)]
    asks += ["--tasks", "pope:split=random,vizwiz", "--out", str(out)]
    assert run_command([*asks, "--part", "1/2"]) is None
    assert "part 1 of 2" in capsys.readouterr().out
    assert run_command([*asks, "--part", "2/2"]) is None
    printed, errors = capsys.readouterr()
    assert "vizwiz is answered: " in errors
    assert "pope:split=random" in printed
    assert "vizwiz_submission.json" in printed
    assert (out / "pope-split-random" / "result.json").is_file()
    # The dtype is part of what a result depends on.
    assert "weights" in run_command([*asks, "--part", "1/2", "--dtype", "bfloat16"])
