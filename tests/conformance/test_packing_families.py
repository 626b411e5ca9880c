"""More language models keep packed records apart, or are refused."""

import pytest
from helpers.packing import check_mixing_family, check_packed_family
from helpers.runs import write_records


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "mistral", "phi3", "gpt_neox", "olmo2", "granite"]
)
def test_packed_rows_give_the_loss_and_gradients_of_the_records_alone(tmp_path, name):
    check_packed_family(name, write_records(tmp_path))


@pytest.mark.parametrize("name", ["mpt", "falcon"])
def test_a_language_model_that_would_mix_packed_records_is_refused(tmp_path, name):
    check_mixing_family(name, write_records(tmp_path))
