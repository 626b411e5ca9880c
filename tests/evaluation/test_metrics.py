"""Scores equal what the benchmarks' own scripts say, on recorded cases where they are present and
on invented ones.
"""

import json
from pathlib import Path

import pytest

from sparsecut.evaluation.tasks import (
    gqa,
    infer_option,
    mmbench,
    mme,
    nlvr,
    normalize_textvqa,
    normalize_vqa,
    pope,
    scienceqa,
    seed,
    textvqa,
    vqa,
)

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "eval-fixtures"
SCORES = {  # what a file's run is scored by
    "vqa": lambda file, run: vqa(run["annotations"], run["predictions"]),
    "textvqa": lambda file, run: textvqa(run["predictions"]),
    "gqa": lambda file, run: gqa(file["questions"], run["predictions"], file["choices"]),
    "pope": lambda file, run: pope(run["questions"], run["answers"]),
    "scienceqa": lambda file, run: scienceqa(file["problems"], run["predictions"]),
    "mmbench": lambda file, run: mmbench(file["rows"], run["predictions"]),
    "mme": lambda file, run: mme(run["results"]),
    "seed": lambda file, run: seed(file["question_type"], run["questions"], run["predictions"]),
    "nlvr": lambda file, run: nlvr(run["examples"], run["predictions"]),
}
PRINTED = {
    "gqa": 0.005,
    "scienceqa": 0.005,
    "seed": 0.005,
    "mmbench": 5e-7,
}  # scripts that print so many digits: half the last


def differences(ours, theirs, digits: float, where: str = ""):
    """Places at which two results differ, numbers by more than digits."""
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), where
        if missing := theirs.keys() ^ ours.keys():
            yield f"{where} {sorted(missing)}"
        for key in theirs.keys() & ours.keys():
            yield from differences(ours[key], theirs[key], digits, f"{where}/{key}")
    elif isinstance(theirs, list):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(a, b, digits, f"{where}/{i}")
    elif isinstance(theirs, float):
        if abs(ours - theirs) > digits * (1 + 1e-6):
            yield f"{where}: {ours} for {theirs}"
    elif ours != theirs:
        yield f"{where}: {ours!r} for {theirs!r}"


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_the_benchmarks_own_scripts(name):
    path = FIXTURES / f"{name}.json"
    if not path.is_file():
        pytest.skip("the recorded cases are not here")
    file = json.loads(path.read_text(encoding="utf-8"))
    for run in file["runs"]:
        found = list(differences(SCORES[name](file, run), run["expected"], PRINTED.get(name, 1e-9)))
        assert not found, (run["name"], found[:5])
    for one in file.get("normalisation", []):
        assert {"vqa": normalize_vqa, "textvqa": normalize_textvqa}[name](one["in"]) == one[
            "out"
        ], one
    for one in file.get("infer", []):
        assert infer_option(one["answer"], one["choices"]) == one["inferred"], one


def test_vqa_counts_equal_answers_with_one_person_left_out():
    def people(*answers):
        return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]

    def worth(said: str, answers: list) -> float:
        kinds = {"question_id": 1, "question_type": "what", "answer_type": "other"}
        return vqa([{**kinds, "answers": answers}], [{"question_id": 1, "answer": said}])[
            "accuracy"
        ]["overall"]

    mixed = people(*["Two dogs."] * 3, *["a cat"] * 2, *["red"] * 5)
    assert (
        worth("2 dogs", mixed) == 90
    )  # each of the three leaves two others: (3 x 2/3 + 7 x 1) / 10
    assert (
        worth("the cat", mixed) == 60 and worth("red", mixed) == 100 and worth("blue", mixed) == 0
    )
    alike = people(*["red"] * 10)
    assert (
        worth("red", alike) == 100 and worth("Red", alike) == 0
    )  # ten that agree are compared as they stand


def test_textvqa_always_normalises():
    answers = ["Red"] * 4 + ["the blue"] * 6
    found = textvqa(
        [
            {"pred_answer": "red.", "gt_answers": answers},
            {"pred_answer": "bluee", "gt_answers": answers},
        ]
    )
    assert found["per_question"] == [1, 0] and found["stvqa_accuracy"] == 0.5
    assert (
        found["stvqa_anls"] == 0.75 / 2
    )  # "red." to "red"; less than half of "the blue" is in "bluee"
    with pytest.raises(ValueError, match="against 10 reference answers, but there are 9"):
        textvqa([{"pred_answer": "a", "gt_answers": ["a"] * 9}])


def test_pope_reads_the_first_sentence():
    labels = [{"label": label} for label in ("yes", "yes", "no", "no")]
    said = ["No dog. Yes.", "None", "not here", "I see one. no"]
    found = pope(labels, [{"answer": text} for text in said])
    assert [found[k] for k in ("TP", "FP", "TN", "FN")] == [1, 1, 1, 1]
    assert found["f1"] == found["accuracy"] == found["yes_ratio"] == 0.5
    assert pope(labels[2:], [{"answer": "no"}] * 2)["f1"] == 0  # nobody said yes
    with pytest.raises(ValueError, match="4 questions and 1 answers"):
        pope(labels, [{"answer": "no"}])


def test_mme_wants_both_questions_of_a_picture():
    rows = [
        ["a", "q", "Yes", "Yes."],
        ["a", "r", "No", "Surely not"],
        ["b", "q", "Yes", "yes"],
        ["b", "r", "No", "no"],
    ]
    found = mme({"count": rows, "code_reasoning": rows[2:]})
    assert found["task"]["count"] == {"score": 125, "acc": 75, "acc_plus": 50, "other": 1}
    assert (found["perception_total"], found["cognition_total"]) == (125, 200)
    with pytest.raises(ValueError, match="do not pair up"):
        mme({"count": rows[1:3]})


def test_gqa_asks_what_follows_from_a_right_answer():
    def question(
        answer: str, *entailed: str, structural: str = "verify", balanced: bool = True
    ) -> dict:
        types = {"structural": structural, "semantic": "obj", "detailed": "x"}
        more = {
            "entailed": list(entailed),
            "isBalanced": balanced,
            "groups": {"global": None},
            "semantic": [],
        }
        return {"question": "is it", "answer": answer, "types": types, **more}

    questions = {
        "1": question("yes", "1", "2", "3"),
        "2": question("no", balanced=False),
        "3": question("cat", structural="query"),
    }
    said = {"1": "yes", "2": "yes", "3": "cat"}
    given = [{"questionId": key, "prediction": text} for key, text in said.items()]
    found = gqa(questions, given)
    assert (found["accuracy"], found["binary"], found["open"], found["consistency"]) == (
        100,
        100,
        100,
        50,
    )
    assert (
        found["validity"] is None and gqa(questions, given[::2])["consistency"] is None
    )  # one entailed is not answered
    with pytest.raises(ValueError, match="1 of 2 questions have no prediction"):
        gqa(questions, given[1:])


def test_choices_are_read_as_each_script_reads_them():
    rows = [
        {"index": 1, "A": "a cat", "B": "dogs", "answer": "A"},
        {"index": 1000001, "A": "dogs", "B": "a cat", "answer": "B"},
    ]
    both, one = (mmbench(rows, said) for said in (["A.", "It is a cat"], ["A.", "neither"]))
    assert (both["circular_accuracy"], both["vanilla_accuracy"]) == ({"Overall": 1}, 1)
    assert (one["circular_accuracy"], one["vanilla_accuracy"], one["inferred"]) == (
        {"Overall": 0},
        0.5,
        ["A", None],
    )
    asked = {"question_type_id": 1, "data_type": "image"}
    questions = [{**asked, "question_id": i, "answer": "A"} for i in range(2)]
    found = seed(
        {"Scene": 1}, questions, [{"question_id": 0, "text": "A"}, {"question_id": 1, "text": "A."}]
    )
    assert found == {"per_type": {"Scene": 50}, "total": 50, "image": 50, "video": None}
    problem = {
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "social science",
        "grade": "grade7",
        "topic": "t",
    }
    texts = ["B", "B. y", "The answer is B.", "b", "C", "The answer is A. The answer is B."]
    said = [
        {"question_id": str(i), "text": text, "prompt": "<image>" if i else ""}
        for i, text in enumerate(texts)
    ]
    found = scienceqa({str(i): problem for i in range(7)}, said)
    assert list(found["llava"]["parsed_index"].values()) == [
        1,
        1,
        1,
        -1,
        -1,
        -1,
        -1,
    ]  # the seventh was not answered
    assert (found["llava"]["correct"], found["llava"]["img_accuracy"]) == (3, 40)
    assert set(found["official_by_group"]) == {"social", "no_context", "grade_7_12", "average", "t"}


def test_nlvr_wants_a_sentence_right_throughout():
    examples = [{"identifier": name, "label": "true"} for name in ("1-0", "1-1", "2-0")]
    said = {f"dev-{one['identifier']}-{i}.png": "True" for one in examples for i in range(6)}
    found = nlvr(examples, {**said, "dev-1-1-5.png": "false"})
    assert found == {"precision": 17 / 18, "consistency": 0.5}
    with pytest.raises(ValueError, match="1 of 18 questions have no prediction"):
        nlvr(examples, {k: v for k, v in said.items() if k != "dev-2-0-3.png"})
