"""Mixtures of sources, and what of sources cannot be put together."""

from collections import Counter

import pytest
from helpers.runs import log, run, stage, write_records

from sparsecut.config.recipe import parse_recipe
from sparsecut.data.packing import LengthGroupedSampler
from sparsecut.schema import UserError


def test_a_mixture_keeps_its_fractions_and_repeats_nothing_before_all_was_seen():
    sampler = LengthGroupedSampler(
        [0] * 100, [0] * 100, 10, seed=1, grouped=False, mixture=[(80, 1.0), (20, 1.0)]
    )
    seen = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == 100
        assert sum(i >= 80 for i in order) == 50
        seen += [i for i in order if i < 80]
    assert len(set(seen[:50])) == 50
    assert set(seen[:100]) == set(range(80))
    assert set(Counter(seen).values()) == {5}
    sampler.set_epoch(3)
    assert [i for i in sampler if i < 80] == seen[150:200]


def test_a_mixture_trains_by_weight(tmp_path):
    write_records(tmp_path)
    data = [
        {"path": str(tmp_path / "data.json"), "weight": 1},
        {"path": str(tmp_path / "texts.json"), "weight": 3},
    ]
    args = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
    run(tmp_path, stage(tmp_path, args=args) | {"data": data})
    assert len(log(tmp_path)) == 15


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"data": {"path": "x", "streaming": True}}, "stage one .*max_steps"),
        ({"data": {"path": "x", "streaming": True, "keep": 3}}, "keep .*streaming"),
        ({"data": [{"path": "x", "streaming": True}, {"path": "y"}]}, "stage one .*streaming"),
        ({"data": [{"path": "x", "weight": 1}, {"path": "y"}]}, "stage one .*weight"),
        ({"data": [{"path": "x", "weight": 0}]}, "weight is 0"),
        ({"data": {"path": "x", "weight": 1}, "pack": 9}, "stage one .*pack"),
        ({"data": {"path": "x", "max_broken": 2}}, "max_broken is 2"),
    ],
)
def test_what_cannot_be_mixed_or_streamed_is_refused(tmp_path, changes, facts):
    one = stage(tmp_path, args={"max_steps": -1, "num_train_epochs": 1}) | changes
    model = {"vision": "tiny", "language": "tiny"}
    plain = {"model": model, "fusion": "llava", "output": "out", "stages": [one]}
    with pytest.raises(UserError, match=facts):
        parse_recipe(plain)
