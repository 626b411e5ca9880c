"""Encoders in stages: taps of several widths and grids are brought to one, and no value changes."""

import pytest
import torch
from helpers import checks
from helpers.families import family_vision, language_config, vision_config
from helpers.tiny import tiny_language, tiny_tokenizer
from transformers import CLIPImageProcessorPil

from sparsecut import SparseCutConfig, fitting
from sparsecut.building import build, load, save
from sparsecut.encoders import read_grid
from sparsecut.hooks import read_taps
from sparsecut.layers import find_blocks
from sparsecut.profiling.counting import count_plan
from sparsecut.schema import UserError
from sparsecut.staged_encoders import make_skipped_states, to_common
from sparsecut.stages import TapShape


def plan_of(*shortcuts, **settings) -> dict:
    taps = [{"taps": list(taps), "layer": layer} for taps, layer in shortcuts]
    return {"shortcuts": taps, "tiles": 0, **settings}


def test_the_grid_is_the_finest_that_the_plan_reads():
    sizes = {}
    for taps in ([4], [3], [1], [0]):
        plan = plan_of(([4], 0), (taps, 1))
        config = SparseCutConfig(
            vision_config=vision_config("swin"), text_config=language_config("llama"), plan=plan
        )
        sizes[taps[0]] = (config.grid.rows, config.grid.width, config.num_image_tokens)
    assert sizes == {4: (2, 32, 4), 3: (4, 32, 16), 1: (8, 32, 64), 0: (8, 32, 64)}
    assert (
        config.vision_depth == 4
    )  # blocks of all stages, although the configuration counts stages


def test_a_coarse_cell_is_repeated_and_followed_by_zeros():
    coarse, common = TapShape(1, 2, 3), TapShape(2, 4, 5)
    states = torch.arange(12.0).view(2, 2, 3)
    spread = to_common(states, coarse, common, "tokens").view(2, 2, 4, 5)
    for row in range(2):
        for column in range(4):
            assert torch.equal(spread[:, row, column, :3], states[:, column // 2])
    assert not spread[..., 3:].any()
    with pytest.raises(UserError, match="1 x 2 cells of width 3"):
        to_common(states[..., :2], coarse, common, "tokens")


@pytest.mark.parametrize("layout", ["tokens", "map", "channels"])
def test_a_skipped_block_passes_on_what_the_next_one_takes(layout):
    shape = TapShape(2, 3, 4)
    sizes = {"tokens": (6, 4), "map": (2, 3, 4), "channels": (4, 2, 3)}
    same = torch.ones(2, *sizes[layout])
    assert make_skipped_states(same, shape, layout) is same
    wide = {"tokens": (6, 2), "map": (2, 3, 2), "channels": (2, 2, 3)}
    other = make_skipped_states(torch.ones(2, *wide[layout]), shape, layout)
    assert other.shape == same.shape


def test_normed_taps_are_normed_over_their_own_channels():
    model = checks.join("convnext", plan=plan_of(([4], 0), ([1], 1), norm=True))
    views = torch.randn(2, *model.grid.view)
    states = read_taps(model.vision_tower, views, model.grid, [1, 4])
    for tap, values in states.items():
        width = model.grid.shapes[tap].width
        normed = model.fusion.normalize(values, tap)
        own = torch.nn.functional.layer_norm(values[..., :width], (width,))
        assert torch.equal(normed[..., :width], own)
        assert not normed[..., width:].any()


@pytest.mark.parametrize("mix", ["channels", "tokens", "attend", "append"])
def test_every_mixer_takes_taps_of_several_stages(mix):
    plan = {"shortcuts": [{"taps": [1, 3, 4], "layer": 0, "mix": mix}], "tiles": 2}
    model = checks.join("swin", plan=plan)
    checks.gradients(model)
    checks.padded(model)


def test_a_model_of_stages_is_saved_and_loaded(tmp_path):
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    family_vision("convnext").save_pretrained(tmp_path / "encoder")
    plan = plan_of(([4], 0), ([2], 1))
    folder = str(tmp_path / "encoder")
    model, processor = build(folder, tiny_language(), plan, **parts, view_size=(32, 64))
    assert model.config.num_image_tokens == 4 * 8 and processor.image_size == (32, 64)
    pixels = torch.randn(1, 1, 3, 32, 64)
    save(model, processor, tmp_path / "model")
    again, _ = load(tmp_path / "model")
    for tap, states in model.encode(pixels).items():
        assert torch.equal(again.encode(pixels)[tap], states)
    cost = count_plan(vision_config("convnext"), language_config("llama"), plan, view_size=64)
    assert cost.num_image_tokens == 64


@pytest.mark.parametrize(
    ("name", "size", "taps", "facts"),
    [
        ("swin", None, 1, {"400 tokens", "20 x 20", "taps from 2 on (100)", "view_size=32"}),
        ("convnext", 80, 1, {"400 tokens", "taps from 4 on (25)", "view_size=32"}),
        ("dinov2", None, 1, {"100 tokens", "10 x 10", "view_size=64"}),
        ("aimv2_vision_model", None, 1, {"100 tokens"}),
        ("swin", None, 4, set()),  # the last stage has few cells
        ("dinov2", 80, 1, set()),  # so the user chose
    ],
)
def test_who_makes_very_many_image_tokens_is_told_what_makes_fewer(
    name, size, taps, facts, caplog, monkeypatch
):
    monkeypatch.setattr(fitting, "MANY_TOKENS", 64)
    encoder = family_vision(name, image_size=80)
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    plan = plan_of(([4], 0), ([taps], 1))
    model, _ = build(encoder, tiny_language(), plan, **parts, view_size=size)
    assert (model.config.num_image_tokens > 64) == (bool(facts) or size is not None)
    told = [r.getMessage() for r in caplog.records if r.name == "sparsecut.fitting"]
    assert len(told) == bool(facts)
    for fact in facts:
        assert fact in told[0]
    if "view_size" in "".join(facts):
        smaller = int(told[0].rpartition("view_size=")[2])
        again, _ = build(encoder, tiny_language(), plan, **parts, view_size=smaller)
        assert again.config.num_image_tokens <= 64
    elif facts:
        assert "view_size" not in told[0]


REFUSED = [
    ("swin", {}, 40, "view_size 40.* multiple of its patch_size 16.*view_size=32"),
    ("resnet", {}, None, "resnet takes images of any size.*view_size"),
    ("pvt", {}, 64, "pvt has learned positions for views of 32 x 32"),
    ("hiera", {}, 36, "view_size 36.* multiple of its patch_size 8"),
]


@pytest.mark.parametrize(("name", "settings", "size", "sentence"), REFUSED)
def test_views_without_whole_cells_are_refused(name, settings, size, sentence):
    with pytest.raises(UserError, match=sentence):
        read_grid(vision_config(name, **settings), size)


def test_an_encoder_whose_blocks_are_elsewhere_is_refused():
    with pytest.raises(UserError, match=r"0 blocks in away\.0.*describes 4"):
        find_blocks(family_vision("swin"), 4, ("away.0",))


def test_batch_statistics_of_an_encoder_stay():
    model = checks.join("resnet")
    inputs = checks.batch(model, side="right")
    before = {k: v.clone() for k, v in model.vision_tower.state_dict().items()}
    features = model.encode(inputs["pixel_values"])
    model.train()
    model(**inputs)
    for tap, states in model.encode(inputs["pixel_values"]).items():
        assert torch.equal(states, features[tap])
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, before[name]), name
