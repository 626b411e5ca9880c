"""The automatic plan: every pair competes, the best under a budget make the plan, and the penalty
only moves gates.
"""

import json
from pathlib import Path

import pytest
import yaml
from helpers.runs import trainer_for, write_records
from helpers.studies import QUICK
from helpers.tiny import tiny_model

from sparsecut import Plan
from sparsecut.experiments.search import choose, search, supernet_plan
from sparsecut.experiments.study import parse_study

PAIRS = [
    {"tap": 3, "layer": 0, "worth": 9.0, "gate": 1.0},
    {"tap": 5, "layer": 2, "worth": 4.0, "gate": 1.0},
    {"tap": 1, "layer": 1, "worth": 3.0, "gate": 1.0},
    {"tap": 2, "layer": 3, "worth": 1.0, "gate": 0.1},
]


def test_the_supernet_holds_every_pair_once_and_starts_with_open_gates():
    plan = supernet_plan(8, 6).check(8, 6)
    pairs = {(s.taps[0], s.layer) for s in plan.shortcuts[1:]}
    assert len(pairs) == len(plan.shortcuts) - 1 == 48 and plan.gate == "one" and plan.rank == 8


def test_pairs_are_taken_best_first_within_the_budget():
    plan = supernet_plan(8, 6)
    chosen = choose(PAIRS, plan, 2, lambda candidate: True)
    assert [(s.taps[0], s.layer) for s in chosen.shortcuts[1:]] == [(3, 0), (5, 2)]
    assert chosen.gate == "zero_projector" and chosen.rank is None and chosen.tiles == 2
    shallow = choose(
        PAIRS, plan, 2, lambda candidate: max(candidate.fine_taps(8)) <= 3
    )  # 5 is too deep, the next best is taken
    assert [(s.taps[0], s.layer) for s in shallow.shortcuts[1:]] == [(3, 0), (1, 1)]
    with pytest.raises(ValueError, match="no pair is within the budget"):
        choose(PAIRS, plan, 2, lambda candidate: False)


def test_the_penalty_shrinks_gates(tmp_path):
    write_records(tmp_path)
    sizes = []
    for penalty in (0.0, 5.0):
        model, processor = tiny_model({"method": "sparsecut", "gate": "one"})
        trainer_for(model, processor, tmp_path, gate_penalty=penalty).train()
        sizes.append(model.fusion.gates.abs().sum().item())
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="a penalty is at least 0"):
        trainer_for(*tiny_model(), tmp_path, gate_penalty=-1)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "a search needs a budget"),
        ({"count": 0}, "has at least 1 shortcut"),
        ({"ratio": 1.0}, "it must be above 1"),
    ],
)
def test_a_search_without_a_budget_is_refused(tmp_path, budget, words):
    with pytest.raises(ValueError, match=words):
        search(parse_study({**QUICK, "output": str(tmp_path)}), **budget)


def test_a_search_writes_a_plan_that_keeps_its_budget(tmp_path):
    from sparsecut.profiling.counting import backbone_config, count

    study = parse_study({**QUICK, "output": str(tmp_path), "budgets": {"short": []}})
    plan, pairs = search(study, count=2, ratio=1.6, rank=2, workers=1, log=lambda line: None)
    assert 1 <= len(plan.shortcuts) - 1 <= 2 and len(pairs) == 48
    assert [p["worth"] for p in pairs] == sorted(
        (p["worth"] for p in pairs), reverse=True
    ) and pairs[0]["worth"] > 0
    written = Plan.from_dict(yaml.safe_load((tmp_path / "search" / "plan.yaml").read_text()))
    assert written == plan
    assert json.loads((Path(tmp_path) / "search" / "search.json").read_text())["count"] == 2
    configs = [backbone_config("shapes", part) for part in ("vision", "language")]
    costs = [
        count(*configs, p).prefill_total_flops for p in (plan, {"method": "llava", "norm": True})
    ]
    assert costs[0] <= 1.6 * costs[1]
