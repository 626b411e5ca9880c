"""What a study may ask: pairs of its variants."""

import pytest
from helpers.studies import QUICK

from sparsecut.experiments.runner import check_folder
from sparsecut.experiments.study import dump_study, load_study, parse_study
from sparsecut.schema import UserError


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        ({"ask": "x", "pairs": [["cut", "plan"]]}, ["questions.depth.pairs", "plan", "plain"]),
        ({"ask": "x", "pairs": [["cut", "cut"]]}, ["questions.depth", "two different"]),
        ({"ask": "x", "pairs": [["cut"]]}, ["questions.depth", "two different"]),
        ({"ask": "x", "pairs": []}, ["questions.depth", "no pairs"]),
        ({"ask": "x"}, ["questions.depth", "pairs"]),
        (
            {"ask": "x", "pairs": [["cut", "plain"]], "budgets": ["longer"]},
            ["questions.depth.budgets", "longer", "long"],
        ),
        (
            {"ask": "x", "pairs": [["cut", "plain"]], "budgets": ["long"]},
            ["questions.depth", "plain", "budgets.long.arms"],
        ),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(tmp_path, question, facts):
    with pytest.raises(UserError) as error:
        parse_study({**QUICK, "output": str(tmp_path), "questions": {"depth": question}})
    for fact in facts:
        assert fact in str(error.value)


def test_questions_are_kept_with_the_study_and_may_come_later(tmp_path):
    first = parse_study({**QUICK, "output": str(tmp_path)})
    dump_study(first, tmp_path / "study.yaml")
    question = {"ask": "Does depth help?", "pairs": [["cut", "plain"]]}
    study = parse_study({**first.to_dict(), "questions": {"depth": question}})
    check_folder(study, tmp_path)
    dump_study(study, tmp_path / "study.yaml")
    assert load_study(tmp_path / "study.yaml") == study != first
