"""The automatic plan: every pair competes, and the best under a budget make the plan."""

import json

import pytest
import yaml
from helpers.runs import trainer_for, write_records
from helpers.studies import QUICK, rough_counts
from helpers.tiny import tiny_model

from sparsecut import Plan
from sparsecut.experiments.search import choose_pairs, make_supernet_plan, search_plan
from sparsecut.experiments.study import parse_study
from sparsecut.methods import make_plan
from sparsecut.profiling import counting, sizes
from sparsecut.schema import UserError

PAIRS = [
    {"tap": 3, "layer": 0, "worth": 9.0, "gate": 1.0},
    {"tap": 5, "layer": 2, "worth": 4.0, "gate": 1.0},
    {"tap": 1, "layer": 1, "worth": 3.0, "gate": 1.0},
    {"tap": 2, "layer": 3, "worth": 1.0, "gate": 0.1},
]


def get_pairs(plan) -> list[tuple[int, int]]:
    """(tap, layer) of a plan's shortcuts besides the coarse input."""
    return [(shortcut.taps[0], shortcut.layer) for shortcut in plan.shortcuts[1:]]


def test_the_supernet_holds_every_pair_once_and_starts_with_open_gates():
    plan = make_supernet_plan(8, 6).check(8, 6)
    assert len(set(get_pairs(plan))) == len(get_pairs(plan)) == 48
    assert plan.gate == "one"
    assert plan.rank == 8


def test_pairs_are_taken_best_first_within_the_budget():
    plan = make_supernet_plan(8, 6)
    chosen = choose_pairs(PAIRS, plan, 2, lambda candidate: True)
    assert get_pairs(chosen) == [(3, 0), (5, 2)]
    assert (chosen.gate, chosen.rank, chosen.tiles) == ("zero_projector", None, 2)
    shallow = choose_pairs(PAIRS, plan, 2, lambda plan: max(plan.fine_taps(8)) <= 3)
    assert get_pairs(shallow) == [(3, 0), (1, 1)], "5 is too deep, the next best is taken"
    with pytest.raises(UserError, match="ratio"):
        choose_pairs(PAIRS, plan, 2, lambda candidate: False)


def test_the_penalty_shrinks_gates(tmp_path):
    write_records(tmp_path)
    sizes = []
    for penalty in (0.0, 5.0):
        model, processor = tiny_model({"method": "sparsecut", "gate": "one"})
        trainer_for(model, processor, tmp_path, gate_penalty=penalty).train()
        sizes.append(model.fusion.gates.abs().sum().item())
    assert sizes[1] < sizes[0]
    with pytest.raises(ValueError, match="penalty"):
        trainer_for(*tiny_model(), tmp_path, gate_penalty=-1)


@pytest.mark.parametrize(
    ("budget", "fact"),
    [({}, "count.*ratio"), ({"count": 0}, "count is 0"), ({"ratio": 1.0}, "ratio is 1.0")],
)
def test_a_search_without_a_budget_is_refused(tmp_path, budget, fact):
    with pytest.raises(UserError, match=fact):
        search_plan(parse_study({**QUICK, "output": str(tmp_path)}), **budget)


def test_a_search_writes_a_plan_that_keeps_its_budget(tmp_path):
    study = parse_study({**QUICK, "output": str(tmp_path), "budgets": {"short": []}})
    baseline = make_plan(study.arms["plain"], 8, 6)
    configs = [sizes.read_backbone_config("shapes", part) for part in ("vision", "language")]
    with rough_counts():
        plan, pairs = search_plan(
            study, count=2, ratio=1.6, rank=2, workers=0, log=lambda line: None
        )
        costs = [counting.count_plan(*configs, one).prefill_total_flops for one in (plan, baseline)]
    assert costs[0] <= 1.6 * costs[1]
    assert 1 <= len(get_pairs(plan)) <= 2
    assert len(pairs) == 48
    importance = [pair["worth"] for pair in pairs]
    assert importance == sorted(importance, reverse=True)
    assert importance[0] > 0
    folder = tmp_path / "search"
    assert Plan.from_dict(yaml.safe_load((folder / "plan.yaml").read_text())) == plan
    assert json.loads((folder / "search.json").read_text())["count"] == 2
