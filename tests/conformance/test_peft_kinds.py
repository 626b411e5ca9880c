"""Kinds of adapters of PEFT on all kinds of models."""

import pytest
from helpers.trl_runs import KINDS

peft = pytest.importorskip("peft")
KINDS_OF_LORA = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}


@pytest.mark.parametrize("settings", KINDS_OF_LORA.values(), ids=KINDS_OF_LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_a_kind_trains_merges_and_loads(kind, settings, tmp_path):
    from helpers.peft_checks import check_an_adapter

    check_an_adapter(kind, tmp_path, **settings)
