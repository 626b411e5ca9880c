"""What plans cost: parts that add up, closed forms, arithmetic by hand explained, and times that
are times.
"""

import json
from dataclasses import replace

import pytest
import torch
from helpers.tiny import tiny_language, tiny_model, tiny_vision
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.methods import METHODS
from sparsecut.modeling import SparseCutForConditionalGeneration
from sparsecut.profiling import counting as cost
from sparsecut.profiling import timing

WIDTH, DEPTH, INNER, WORDS = 4096, 32, 11008, 32000  # a 7B Llama
PER_TOKEN = (
    DEPTH * 2 * (4 * WIDTH**2 + 3 * WIDTH * INNER)
)  # two operations per weight: projections and feed-forward


@pytest.fixture(scope="module")
def large():
    """Counts at the sizes of CLIP-L/336 and a 7B Llama, made when asked for and once."""
    made = {}
    sizes = (
        cost.backbone_config("clip-l-336", "vision"),
        cost.backbone_config("llama-7b", "language"),
    )

    def of(plan):
        if plan not in made:
            made[plan] = cost.count(*sizes, plan)
        return made[plan]

    return of


def tiny_configs():
    return tiny_vision().config, tiny_language().config


def attention(tokens: int) -> int:
    """Both products of attention over a prompt in all layers, every position with every other."""
    return DEPTH * 4 * tokens**2 * WIDTH


@pytest.mark.parametrize("plan", ["llava", "sparsecut"])
def test_a_plain_llama_costs_its_closed_form(large, plan):
    c = large(plan)
    head = 2 * WIDTH * WORDS
    prompt = c.num_prompt_tokens * PER_TOKEN + attention(c.num_prompt_tokens) + head
    assert c.language_prefill_flops == pytest.approx(prompt, rel=0.01)
    token = PER_TOKEN + DEPTH * 4 * (c.num_prompt_tokens + 1) * WIDTH + head
    assert c.language_per_new_token_flops == pytest.approx(token, rel=0.01)
    assert c.kv_cache_bytes == c.num_prompt_tokens * DEPTH * 2 * WIDTH * 2
    assert c.num_language_parameters == pytest.approx(6.74e9, rel=0.001)
    assert c.num_vision_parameters == pytest.approx(303.5e6, rel=0.001)
    assert c.weight_bytes == 2 * c.num_total_parameters


# The survey's arithmetic by hand for a picture and 64 text tokens, in TFLOP, and what it has that
# ours has not: newline tokens, and for the released 7B form two fusions that are computed and
# thrown away.
BY_HAND = {
    "llava": (8.80, 0, 0),
    "hires_tokens": (43.1, 48, 0),
    "official_7b_as_run": (10.7, 0, 2),
    "dense_connector_sti": (10.7, 0, 0),
    "deepstack": (10.4, 0, 0),
    "deepstack_l": (10.4, 0, 0),
    "lsf_internal_direct": (8.88, 0, 0),
}


@pytest.mark.parametrize("plan", [name for name in BY_HAND if name in METHODS])
def test_totals_agree_with_the_arithmetic_by_hand(large, plan):
    """By hand, the encoder's last block runs too, attention is halved for the causal mask, and the
    head is left out.
    """
    c = large(plan)
    total, newlines, thrown_away = BY_HAND[plan]
    length = c.num_prompt_tokens + newlines
    encoder = (c.encoder_coarse_flops + c.encoder_fine_flops) * 24 / 23
    fusion = c.fusion_flops * (1 + thrown_away / 7)
    language = length * PER_TOKEN + attention(length) / 2
    assert encoder + fusion + language == pytest.approx(total * 1e12, rel=0.006)
    assert c.prefill_total_flops == pytest.approx(total * 1e12, rel=0.04)


PLANS = (
    "llava",
    "hires_tokens",
    "sparsecut",
    {"method": "sparsecut", "fine": 0.5, "gate": "context", "rank": 2},
    "mmfuser",
)


@pytest.mark.parametrize("plan", PLANS)
def test_parts_add_up_to_a_whole_real_forward(plan):
    """Pretended tensors count what a real model of the same size does, by part and at once, in
    prompts of two pictures.
    """
    vision, language = tiny_configs()
    c = cost.count(vision, language, plan, num_text_tokens=5, num_pictures=2, dtype=torch.float32)
    config = cost.configuration_of(vision, language, plan)
    model = SparseCutForConditionalGeneration(config).eval()
    ids = torch.tensor([[config.image_token_id] * c.num_image_tokens + [1] * 5])
    pixels = torch.randn(2, model.plan.num_views, 3, 16, 16)
    with torch.no_grad(), cost.counter() as whole:
        images = model.get_image_features(pixels)
        encoding = whole.get_total_flops()
        output = model(input_ids=ids, mm_encoder_outputs={"image": images}, logits_to_keep=1)
    parts = c.encoder_coarse_flops, c.encoder_fine_flops, c.fusion_flops, c.language_prefill_flops
    assert sum(parts) == c.prefill_total_flops == whole.get_total_flops()
    assert sum(parts[:3]) == encoding
    assert bool(c.encoder_fine_flops) == bool(model.plan.tiles)
    assert c.kv_cache_bytes == cost._cache_bytes(output.past_key_values)
    assert c.num_total_parameters == sum(p.numel() for p in model.parameters())
    assert c.num_fusion_parameters == sum(p.numel() for p in model.fusion.parameters())
    assert (
        c.num_total_parameters
        == c.num_vision_parameters + c.num_fusion_parameters + c.num_language_parameters
    )


@pytest.mark.parametrize("plan", ["llava", "sparsecut"])
def test_what_training_keeps_is_what_a_padded_batch_keeps(plan):
    vision, language = tiny_configs()
    c = cost.count(vision, language, plan, num_text_tokens=5, batch_size=3, dtype=torch.float32)
    config = cost.configuration_of(vision, language, plan)
    model = SparseCutForConditionalGeneration(config).eval()
    ids = torch.tensor([[config.image_token_id] * c.num_image_tokens + [1] * 5])
    mask = torch.ones(3, ids.shape[1], dtype=torch.long)
    mask[0, -1] = 0
    pixels = torch.randn(1, model.plan.num_views, 3, 16, 16)
    real = [
        cost.saved_bytes(model, ids, pixels, mask, parts)
        for parts in (["fusion"], ["fusion", "language"])
    ]
    assert [c.training_fusion_bytes, c.training_fusion_language_bytes] == real and real[0] < real[1]


def test_attention_of_every_kernel_counts_the_same():
    """The formula for the kernel that torch's counter does not know agrees with plain matrix
    products.
    """
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 10, 8)
    with cost.counter() as ours:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    with FlopCounterMode(display=False) as plain:
        (query @ key.transpose(-1, -2)).softmax(-1) @ key
    assert ours.get_total_flops() == plain.get_total_flops() > 0


def test_more_costs_more():
    vision, language = tiny_configs()
    one = cost.count(vision, language, "sparsecut")
    two = cost.count(vision, language, "sparsecut", num_pictures=2)
    none = cost.count(vision, language, "sparsecut", num_pictures=0)
    assert (
        two.encoder_fine_flops == 2 * one.encoder_fine_flops
        and two.fusion_flops == 2 * one.fusion_flops
    )
    assert (
        none.num_image_tokens
        == none.encoder_coarse_flops
        == none.encoder_fine_flops
        == none.fusion_flops
        == 0
    )
    assert none.prefill_total_flops < one.prefill_total_flops < two.prefill_total_flops
    wide = cost.count(vision, language, "sparsecut", dtype=torch.float32)
    assert (
        wide.weight_bytes == 2 * one.weight_bytes
        and wide.prefill_total_flops == one.prefill_total_flops
    )
    assert (
        cost.count(vision, language, "sparsecut", batch_size=2).training_fusion_bytes
        > one.training_fusion_bytes
    )


def test_counting_changes_no_configuration_and_needs_no_dtype_back():
    vision, language = tiny_configs()
    before = vision.to_dict(), language.to_dict(), torch.get_default_dtype()
    c = cost.count(vision, language, "llava")
    assert (vision.to_dict(), language.to_dict(), torch.get_default_dtype()) == before
    assert cost.Count.from_dict(json.loads(json.dumps(c.to_dict()))) == c


@pytest.mark.parametrize(("vision", "language"), [*zip(*cost.REFERENCE.values(), strict=True)])
def test_every_named_size_can_be_counted(vision, language):
    configs = cost.backbone_config(vision, "vision"), cost.backbone_config(language, "language")
    c = cost.count(*configs, "llava")
    assert c.num_image_tokens == {"clip-l-336": 576, "siglip-so400m-384": 729}[vision]
    assert c.num_language_parameters == pytest.approx(
        {"llama-7b": 6.74e9, "llama-13b": 13.0e9}[language], rel=0.01
    )


def test_mistakes_are_sentences():
    vision, language = tiny_configs()
    with pytest.raises(ValueError, match="did you mean 'llama-7b'"):
        cost.backbone_config("lama-7b", "language")
    with pytest.raises(ValueError, match="known sizes are clip-l-336"):
        cost.backbone_config("llama-7b", "vision")
    with pytest.raises(
        ValueError, match="num_text_tokens is 0, but must be a whole number of at least 1"
    ):
        cost.count(vision, language, "llava", num_text_tokens=0)
    with pytest.raises(ValueError, match="missing or unknown: dtype"):
        plain = cost.count(vision, language, "llava").to_dict()
        cost.Count.from_dict({k: v for k, v in plain.items() if k != "dtype"})
    with pytest.raises(ValueError, match="repeats is 0"):
        timing.measure_all({"a": (None, None)}, repeats=0)
    with pytest.raises(ValueError, match="at least one"):
        timing.measure_all({})
    huge = cost.backbone_config("llama-13b", "language")
    huge.num_hidden_layers = 400
    with pytest.raises(ValueError, match="the weights alone take"):
        timing.random_models(cost.backbone_config("clip-l-336", "vision"), huge, {"llava": "llava"})


def test_measuring_gives_positive_ordered_figures():
    models = {"llava": tiny_model("llava"), "sparsecut": tiny_model()}
    models["llava"][0].train()
    measured = timing.measure_all(
        models, num_new_tokens=3, num_text_tokens=4, repeats=3, warmup=1, batch_size=2
    )
    for m in measured.values():
        assert min(m.encoder_ms, m.fusion_ms, m.language_prefill_ms, m.tokens_per_second) > 0
        assert max(m.encoder_ms, m.language_prefill_ms) < m.first_token_ms
        assert m.peak_bytes is None or m.peak_bytes >= 0
        assert m.first_token_spread_ms >= 0
        assert json.loads(json.dumps(m.to_dict())) == m.to_dict()
    assert measured["llava"].first_token_ratio == measured["llava"].new_token_ratio == 1
    assert models["llava"][0].training  # as it was
    single = timing.measure(models["sparsecut"][0], repeats=1, num_new_tokens=2)
    assert single.num_prompt_tokens == 64 + 4 and single.first_token_spread_ms == 0


def test_models_to_measure_share_their_backbones():
    models = timing.random_models(*tiny_configs(), {"a": "llava", "b": "sparsecut"})
    (a, _), (b, _) = models.values()
    assert (
        a.vision_tower is b.vision_tower
        and a.language_model is b.language_model
        and a.fusion is not b.fusion
    )
    assert timing.measure_all(models, repeats=1, num_new_tokens=2)["b"].first_token_ms > 0


def test_the_command(tmp_path):
    file = tmp_path / "costs" / "all.json"
    arguments = [
        "cost",
        "llava",
        "sparsecut",
        "--vision",
        "shapes",
        "--language",
        "shapes",
        "--measure",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["plan", "llava", "sparsecut"]
    assert "1.000" in lines[1] and "first token ms" in result.output
    written = json.loads(file.read_text())
    c = cost.Count.from_dict(written["sparsecut"]["count"])
    assert written["llava"]["measured"]["repeats"] == 5 and replace(c, dtype="x") != c


def test_added_features_cost_the_language_model_nothing_that_is_counted():
    """Sums are not counted, so an added-feature plan's language model costs LLaVA's;
    benchmarks/llm_side.py times it.
    """
    configs = tiny_configs()
    plain, added = (cost.count(*configs, plan) for plan in ("llava", "sparsecut"))
    assert added.language_prefill_flops == plain.language_prefill_flops
    assert added.language_per_new_token_flops == plain.language_per_new_token_flops


def test_the_pairs_of_the_benchmark():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "benchmarks" / "llm_side.py"
    spec = importlib.util.spec_from_file_location("llm_side", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ran = []
    pairs = module.compare(
        {name: lambda name=name: ran.append(name) for name in ("control", "a", "llava")}, 3
    )
    assert {name: len(found) for name, found in pairs.items()} == {"control": 3, "a": 3}
    assert ran[6:10] == ["control", "llava", "a", "llava"] and ran[10:12] == [
        "llava",
        "control",
    ]  # after two warm-ups each
    figures = module.summary([(1.1, 1.0), (2.2, 2.0), (0.9, 1.0)])
    assert figures["ratio"] == 1.1 and figures["interval"][0] <= 1.1 <= figures["interval"][1]
