"""What a study's report says of rates and of questions that text answers."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.studies import QUICK, make_study

from sparsecut.evaluation.statistics import estimate_difference, pool_spread
from sparsecut.evaluation.variant_answers import Answers
from sparsecut.experiments.results import compute_results
from sparsecut.experiments.study_parts import Question
from sparsecut.reports.protocol_tables import make_rate_table, make_text_table
from sparsecut.reports.question_tables import make_question_tables
from sparsecut.reports.study import write_study_report
from sparsecut.reports.study_tables import make_main_table

VARIANTS = ["llava", "sparsecut"]
GRID = (1e-4, 3e-4, 1e-3)
STAGE = {**QUICK["recipe"]["stages"][0], "train": ["fusion", "language"]}
# Fractions right on dev by rate: llava's best lies in the middle, sparsecut's at the edge.
DEV = {"llava": (0.2, 0.8, 0.3), "sparsecut": (0.2, 0.5, 0.9)}


def copy_run(run: Path, to: Path, is_right, **facts) -> None:
    """Copy a made-up run, with other right answers: `is_right(number, record)`."""
    shutil.copytree(run, to)
    path = to / "eval" / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for number, record in enumerate(records):
        record["correct"] = is_right(number, record)
        if facts.get("blind"):
            record["images"] = []
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    noted = json.loads((to / "facts.json").read_text()) | facts
    (to / "facts.json").write_text(json.dumps(noted))


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A made-up study with dev runs, and a run without images that is right about every third."""
    out = make_study(tmp_path / "study", VARIANTS, budgets=("main",))
    study = yaml.safe_load((out / "study.yaml").read_text())
    study["recipe"] = {**QUICK["recipe"], "stages": [STAGE]}
    study |= {"budgets": {"main": []}, "rates": {"grid": list(GRID), "seeds": [100, 101]}}
    (out / "study.yaml").write_text(yaml.safe_dump(study))
    run = out / "runs" / "main" / "llava" / "0"
    for variant, scores in DEV.items():
        for rate, score in zip(GRID, scores, strict=True):
            for seed in (100, 101):
                place = out / "rates" / variant / f"{rate:g}" / str(seed)
                copy_run(run, place, lambda number, _, score=score: number % 10 < 10 * score)
    for seed in (0, 1):
        place = out / "runs" / "main" / "text_only" / str(seed)
        copy_run(run, place, lambda number, _: number % 3 == 0, blind=True)
    for variant, rate in (("llava", 3e-4), ("sparsecut", 1e-3)):
        for seed in (0, 1):
            set_rate(out / "runs" / "main" / variant / str(seed), rate)
    return out


def set_rate(run: Path, rate: float) -> None:
    """Note a run's fusion rate."""
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({**facts, "rate": rate}))


def test_the_whole_grid_is_shown_with_the_choice_and_what_the_default_loses(tuned):
    results = compute_results(tuned)
    rates = {name: choice["rate"] for name, choice in results["rates"].items()}
    assert rates == {"llava": 3e-4, "sparsecut": 1e-3}
    head, llava, sparsecut, most = make_rate_table(results)
    assert head[1:4] == ["0.0001", "0.0003", "0.001"]
    assert [cell.endswith("*") for cell in llava[1:4]] == [False, True, False]
    assert sparsecut[-2] == "40.0" and "edge" in sparsecut[-1] and "edge" not in llava[-1]
    assert most[1:4] == ["70.0", "40.0", "50.0"]
    table = make_main_table(results)
    assert table[0][1] == "rate"
    assert {row[0]: row[1] for row in table[1:]} == {"llava": "0.0003", "sparsecut": "0.001"}


def test_open_questions_are_scored_apart_and_shares_are_told(tuned):
    results = compute_results(tuned)
    text = results["text"]
    assert text["num_open"] == 160  # two of three of 40 images x 6 questions
    assert text["text_only"]["questions"] == pytest.approx(1 / 3)
    lines = (tuned / "runs/main/llava/0/eval/predictions.jsonl").read_text().splitlines()
    right = [json.loads(line)["correct"] for line in lines]
    lines = (tuned / "runs/main/llava/1/eval/predictions.jsonl").read_text().splitlines()
    right += [json.loads(line)["correct"] for line in lines]
    is_open = [number % 3 != 0 for number in range(240)] * 2
    expected = sum(r for r, o in zip(right, is_open, strict=True) if o) / sum(is_open)
    assert text["arms"]["llava"]["open"]["value"] == pytest.approx(expected)
    gap = text["arms"]["sparsecut"]
    value = gap["open"]["value"] - text["arms"]["llava"]["open"]["value"]
    assert gap["difference"]["value"] == pytest.approx(value)
    assert len(make_text_table(results)) == 3
    assert "text_only" not in results["arms"], "it is no variant, and counts in no correction"


def test_open_questions_have_a_frontier_and_drawings(tuned):
    results = compute_results(tuned)
    scores = {name: parts["open"]["value"] for name, parts in results["text"]["arms"].items()}
    dear = results["arms"]["sparsecut"]["relative"]["large"]
    assert dear > 1
    best = max(scores, key=scores.get)
    expected = ["llava"] if best == "llava" else ["llava", "sparsecut"]
    assert results["text"]["frontier"]["large"] == expected
    write_study_report(tuned)
    names = {path.name.split(".")[1] for path in tuned.glob("report.*.svg")}
    assert names == {"open-here", "open-large", "average-here", "average-large"}


def test_the_commonest_answer_to_a_text_counts_as_given_by_it(tuned):
    path = tuned / "runs" / "main" / "llava" / "0" / "eval" / "predictions.jsonl"
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    correct = [number % 3 == 1 for number in range(len(ids))]
    baseline = {"ids": ids, "answers": ["a"] * len(ids), "correct": correct}
    (tuned / "text_baseline.json").write_text(json.dumps(baseline))
    text = compute_results(tuned)["text"]
    assert text["num_open"] == 80
    assert text["commonest"]["questions"] == pytest.approx(1 / 3)


def test_runs_at_a_rate_that_is_no_longer_chosen_are_left_out_and_named(tuned):
    set_rate(tuned / "runs" / "main" / "llava" / "1", 1e-4)
    results = compute_results(tuned)
    assert results["stale"] == ["main/llava/1"]
    assert results["arms"]["llava"]["results"]["main"]["seeds"] == [0]
    write_study_report(tuned)
    assert "main/llava/1" in (tuned / "report.md").read_text()


def test_the_average_may_be_over_kinds(tuned):
    study = yaml.safe_load((tuned / "study.yaml").read_text())
    (tuned / "study.yaml").write_text(yaml.safe_dump({**study, "average_over": "kinds"}))
    results = compute_results(tuned)
    assert results["levels"] == ["count", "lines", "place", "shade", "shape", "texture"]
    result = results["arms"]["llava"]["results"]["main"]
    kinds = [result["groups"][kind] for kind in results["levels"]]
    assert result["average"]["value"] == pytest.approx(sum(kinds) / 6)


def test_a_report_of_an_unfinished_choice_names_what_is_missing(tuned):
    shutil.rmtree(tuned / "rates" / "llava" / "0.0003")
    shutil.rmtree(tuned / "runs" / "main" / "text_only" / "1")
    write_study_report(tuned)
    results = json.loads((tuned / "report.json").read_text())
    assert results["rates"]["llava"]["missing"] == 2
    assert results["missing"] == ["main/text_only/1"]
    assert not results["stale"], "a choice that may still change makes no run stale"


def ask(out: Path, questions: dict) -> None:
    """Add questions to a study that has run."""
    study = yaml.safe_load((out / "study.yaml").read_text())
    (out / "study.yaml").write_text(yaml.safe_dump({**study, "questions": questions}))


def read_answers(out: Path, budget: str, variant: str) -> Answers:
    runs = {}
    for seed in (0, 1):
        path = out / "runs" / budget / variant / str(seed) / "eval" / "predictions.jsonl"
        runs[seed] = [json.loads(line) for line in path.read_text().splitlines()]
    return Answers.from_records(runs)


def test_a_question_has_its_pairs_differences_corrected_for_all_of_them(tmp_path):
    names = ["llava", "sparsecut", "dci", "mmfuser"]
    out = make_study(tmp_path / "study", names[:3], budgets=("main", "long"))
    study = yaml.safe_load((out / "study.yaml").read_text())
    study["arms"]["mmfuser"] = "mmfuser"  # not run yet
    (out / "study.yaml").write_text(yaml.safe_dump(study))
    pairs = [["sparsecut", "llava"], ["sparsecut", "dci"], ["mmfuser", "llava"]]
    ask(out, {"levels": {"ask": "Do levels help?", "pairs": pairs, "budgets": ["main", "long"]}})

    question = compute_results(out)["questions"]["levels"]
    assert question["comparisons"] == 6  # also those that are not there yet
    rows = {(row["budget"], *row["pair"]): row for row in question["rows"]}
    assert len(rows) == 4
    for (budget, first, second), row in rows.items():
        answers = {name: read_answers(out, budget, name) for name in names[:3]}
        expected = estimate_difference(
            answers[first], answers[second], comparisons=6, spread=pool_spread(answers)
        )
        assert row["average"]["value"] == pytest.approx(expected.average.value)
        assert row["average"]["low"] == pytest.approx(expected.average.low)

    write_study_report(out)
    for name in ("report.md", "report.html"):
        assert "Do levels help?" in (out / name).read_text()


def test_a_question_is_answered_for_open_questions_too(tuned):
    ask(tuned, {"levels": {"ask": "Do levels help?", "pairs": [["sparsecut", "llava"]]}})
    results = compute_results(tuned)
    (row,) = results["questions"]["levels"]["rows"]
    question = Question("Do levels help?", (("sparsecut", "llava"), ("sparsecut", "absent")))
    later = compute_results(tuned, {"later": question})["questions"]
    assert [one["pair"] for one in later["later"]["rows"]] == [["sparsecut", "llava"]]
    difference = results["text"]["arms"]["sparsecut"]["difference"]
    assert row["open"] == pytest.approx(difference)
    (table,) = make_question_tables(results)
    assert len(table["rows"]) == 2 and any("open" in cell for cell in table["rows"][0])
