"""Scores equal what the benchmarks' own scripts say, on recorded cases where they are present and on invented ones."""

import json
from pathlib import Path

import pytest

from sparsecut.tasks import (
    gqa,
    infer_option,
    mmbench,
    mme,
    nlvr,
    pope,
    scienceqa,
    seed,
    textvqa,
    textvqa_text,
    vqa,
    vqa_text,
)

FIXTURES = Path(__file__).parents[2] / "shared" / "data" / "eval-fixtures"
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
        assert {"vqa": vqa_text, "textvqa": textvqa_text}[name](one["in"]) == one["out"], one
    for one in file.get("infer", []):
        assert infer_option(one["answer"], one["choices"]) == one["inferred"], one
