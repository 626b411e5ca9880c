"""Scores equal those of the benchmarks' own scripts, on recorded cases and on invented ones."""

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
from sparsecut.schema import UserError

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "eval-fixtures"
SCORES = {  # how a run of a file is scored
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
NORMALIZE = {"vqa": normalize_vqa, "textvqa": normalize_textvqa}
# Half of the last digit, for scripts that print few digits.
TOLERANCES = {"gqa": 0.005, "scienceqa": 0.005, "seed": 0.005, "mmbench": 5e-7}


def find_differences(ours, theirs, tolerance: float, where: str = ""):
    """Places at which two results differ, numbers by more than the tolerance."""
    if isinstance(theirs, dict):
        if theirs.keys() != ours.keys():
            yield f"{where} {sorted(theirs.keys() ^ ours.keys())}"
        for key in theirs.keys() & ours.keys():
            yield from find_differences(ours[key], theirs[key], tolerance, f"{where}/{key}")
    elif isinstance(theirs, list):
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from find_differences(one, other, tolerance, f"{where}/{i}")
    elif isinstance(theirs, float):
        if abs(ours - theirs) > tolerance * (1 + 1e-6):
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
        result = SCORES[name](file, run)
        tolerance = TOLERANCES.get(name, 1e-9)
        differences = list(find_differences(result, run["expected"], tolerance))
        assert not differences, (run["name"], differences[:5])
    for case in file.get("normalisation", []):
        assert NORMALIZE[name](case["in"]) == case["out"], case
    for case in file.get("infer", []):
        assert infer_option(case["answer"], case["choices"]) == case["inferred"], case


def make_references(*answers: str) -> list[dict]:
    return [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("2 dogs", 90),  # each of the three leaves two others: (3 x 2/3 + 7 x 1) / 10
        ("the cat", 60),
        ("red", 100),
        ("blue", 0),
    ],
)
def test_vqa_counts_equal_answers_with_one_person_left_out(answer, score):
    answers = make_references(*["Two dogs."] * 3, *["a cat"] * 2, *["red"] * 5)
    assert score_one_vqa_answer(answer, answers) == score


def test_vqa_compares_ten_equal_references_as_they_stand():
    answers = make_references(*["red"] * 10)
    assert score_one_vqa_answer("red", answers) == 100
    assert score_one_vqa_answer("Red", answers) == 0


def score_one_vqa_answer(answer: str, references: list) -> float:
    annotation = {"question_id": 1, "question_type": "what", "answer_type": "other"}
    annotation["answers"] = references
    result = vqa([annotation], [{"question_id": 1, "answer": answer}])
    return result["accuracy"]["overall"]


def test_textvqa_always_normalizes():
    references = ["Red"] * 4 + ["the blue"] * 6
    answers = ["red.", "bluee"]
    pairs = [{"pred_answer": answer, "gt_answers": references} for answer in answers]
    result = textvqa(pairs)
    assert result["per_question"] == [1, 0]
    assert result["stvqa_accuracy"] == 0.5
    # "red." has 0.75 of "red", and "bluee" less than half of "the blue".
    assert result["stvqa_anls"] == 0.75 / 2
    with pytest.raises(UserError, match=r"10 .* 9"):
        textvqa([{"pred_answer": "a", "gt_answers": ["a"] * 9}])


def test_pope_reads_the_first_sentence():
    labels = [{"label": label} for label in ("yes", "yes", "no", "no")]
    texts = ["No dog. Yes.", "None", "not here", "I see one. no"]
    result = pope(labels, [{"answer": text} for text in texts])
    assert [result[key] for key in ("TP", "FP", "TN", "FN")] == [1, 1, 1, 1]
    assert result["f1"] == result["accuracy"] == result["yes_ratio"] == 0.5
    assert pope(labels[2:], [{"answer": "no"}] * 2)["f1"] == 0  # without any yes
    with pytest.raises(UserError, match="4 questions and 1 answers"):
        pope(labels, [{"answer": "no"}])


def test_mme_counts_images_with_both_answers_right():
    rows = [
        ["a", "q", "Yes", "Yes."],
        ["a", "r", "No", "Surely not"],
        ["b", "q", "Yes", "yes"],
        ["b", "r", "No", "no"],
    ]
    result = mme({"count": rows, "code_reasoning": rows[2:]})
    assert result["task"]["count"] == {"score": 125, "acc": 75, "acc_plus": 50, "other": 1}
    assert result["perception_total"] == 125
    assert result["cognition_total"] == 200
    for unpaired in (rows[1:3], rows[:3]):
        with pytest.raises(UserError, match="rows of count"):
            mme({"count": unpaired})


def make_gqa_question(answer: str, *entailed: str, kind="verify", is_balanced=True) -> dict:
    return {
        "question": "is it",
        "answer": answer,
        "types": {"structural": kind, "semantic": "obj", "detailed": "x"},
        "entailed": list(entailed),
        "isBalanced": is_balanced,
        "groups": {"global": None},
        "semantic": [],
    }


def test_gqa_consistency_is_about_what_a_right_answer_entails():
    questions = {
        "1": make_gqa_question("yes", "1", "2", "3"),
        "2": make_gqa_question("no", is_balanced=False),
        "3": make_gqa_question("cat", kind="query"),
    }
    answers = {"1": "yes", "2": "yes", "3": "cat"}
    predictions = [{"questionId": key, "prediction": text} for key, text in answers.items()]
    result = gqa(questions, predictions)
    assert result["accuracy"] == result["binary"] == result["open"] == 100
    assert result["consistency"] == 50
    assert result["validity"] is None
    assert gqa(questions, predictions[::2])["consistency"] is None  # question 2 has no answer
    with pytest.raises(UserError, match=r"1 of 2 .*'1'"):
        gqa(questions, predictions[1:])


def test_mmbench_wants_all_rotations_right():
    rows = [
        {"index": 1, "A": "a cat", "B": "dogs", "answer": "A"},
        {"index": 1000001, "A": "dogs", "B": "a cat", "answer": "B"},
    ]
    right = mmbench(rows, ["A.", "It is a cat"])
    assert right["circular_accuracy"] == {"Overall": 1}
    assert right["vanilla_accuracy"] == 1
    half = mmbench(rows, ["A.", "neither"])
    assert half["circular_accuracy"] == {"Overall": 0}
    assert half["vanilla_accuracy"] == 0.5
    assert half["inferred"] == ["A", None]


def test_seed_wants_the_bare_letter():
    facts = {"question_type_id": 1, "data_type": "image", "answer": "A"}
    questions = [{**facts, "question_id": i} for i in range(2)]
    predictions = [{"question_id": 0, "text": "A"}, {"question_id": 1, "text": "A."}]
    result = seed({"Scene": 1}, questions, predictions)
    assert result == {"per_type": {"Scene": 50}, "total": 50, "image": 50, "video": None}


def test_scienceqa_reads_a_letter_or_one_sentence():
    problem = {
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "",
        "image": None,
        "subject": "social science",
        "grade": "grade7",
        "topic": "t",
    }
    parsed = {
        "B": 1,
        "B. y": 1,
        "The answer is B.": 1,
        "b": -1,
        "C": -1,
        "The answer is A. The answer is B.": -1,
    }
    predictions = []
    for i, text in enumerate(parsed):
        prompt = "<image>" if i else ""
        predictions.append({"question_id": str(i), "text": text, "prompt": prompt})
    problems = {str(i): problem for i in range(len(parsed) + 1)}
    result = scienceqa(problems, predictions)
    not_answered = -1
    assert list(result["llava"]["parsed_index"].values()) == [*parsed.values(), not_answered]
    assert result["llava"]["correct"] == 3
    assert result["llava"]["img_accuracy"] == 40
    groups = {"social", "no_context", "grade_7_12", "average", "t"}
    assert set(result["official_by_group"]) == groups


def test_nlvr_wants_a_sentence_right_throughout():
    examples = [{"identifier": name, "label": "true"} for name in ("1-0", "1-1", "2-0")]
    predictions = {}
    for example in examples:
        for i in range(6):
            predictions[f"dev-{example['identifier']}-{i}.png"] = "True"
    result = nlvr(examples, {**predictions, "dev-1-1-5.png": "false"})
    assert result == {"precision": 17 / 18, "consistency": 0.5}
    del predictions["dev-2-0-3.png"]
    with pytest.raises(UserError, match=r"1 of 18 .*2-0-3"):
        nlvr(examples, predictions)
