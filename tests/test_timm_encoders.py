"""Encoders of timm, by transformers' `timm_wrapper`: read as any other, at any size they take."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import checks
from helpers.families import language_config
from helpers.tiny import tiny_language, tiny_tokenizer
from PIL import Image
from transformers import CLIPImageProcessorPil, TimmWrapperConfig

from sparsecut import SparseCutConfig, timm_encoders
from sparsecut.building import build, load, read_depths, save
from sparsecut.encoders import make_encoder, prepare_to_load, read_grid
from sparsecut.hooks import read_taps
from sparsecut.profiling.counting import count_plan
from sparsecut.schema import UserError

try:
    timm = timm_encoders.import_timm("of the tests")
    REASON = ""
except UserError as problem:
    timm, REASON = None, str(problem)
needs_timm = pytest.mark.skipif(timm is None, reason=REASON)

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 2}
VIT = SMALL | {"img_size": 32, "dynamic_img_size": True}
STAGES = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
WINDOWS = {"depths": (1, 2, 1), "embed_dim": 8, "num_heads": (1, 2, 2), "strict_img_size": False}
# One for each way to hold blocks and to return states: class and register tokens or none, maps with
# channels first or last. Each with the pixels of its views.
ENCODERS = {
    "vit_tiny_patch16_224": (VIT | {"patch_size": 8}, 32),
    "vit_tiny_patch16_224.fixed": (SMALL | {"img_size": 32, "patch_size": 8}, 32),
    "deit_tiny_distilled_patch16_224": (VIT | {"patch_size": 8}, 32),
    "vit_small_patch14_reg4_dinov2": (VIT | {"patch_size": 8}, 32),
    "vit_base_patch16_siglip_224": (VIT | {"patch_size": 8}, 32),
    "eva02_tiny_patch14_224": (VIT | {"patch_size": 8}, 32),
    "vit_small_patch16_dinov3": (SMALL | {"embed_dim": 32, "patch_size": 8}, 32),
    "swin_tiny_patch4_window7_224": (WINDOWS | {"img_size": 32, "window_size": 2}, 32),
    "convnext_atto": (STAGES, 64),
    "resnet10t": ({"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 64),
}
WHOLE = ["vit_small_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"]


def timm_config(name: str, **more) -> TimmWrapperConfig:
    return TimmWrapperConfig(
        architecture=name.partition(".")[0], model_args={**ENCODERS[name][0], **more}
    )


def timm_encoder(name: str, **more):
    torch.manual_seed(0)
    encoder = make_encoder(timm_config(name, **more)).eval()
    for parameter in encoder.parameters():  # scales of branches that begin at nearly nothing
        if parameter.dim() == 1 and parameter.abs().max() < 1e-3:
            torch.nn.init.normal_(parameter, std=0.2)
    return encoder


@pytest.fixture(scope="module", params=ENCODERS)
def model(request):
    if timm is None:
        pytest.skip(REASON)
    encoder = timm_encoder(request.param)
    return checks.join(encoder, view_size=ENCODERS[request.param][1])


@pytest.mark.parametrize("check", [checks.taps, checks.stops, checks.gradients, checks.padded])
def test_every_kind_of_timm_encoder(model, check):
    check(model)


@needs_timm
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("check", [checks.cached, checks.checkpointing, checks.compiles])
def test_a_model_with_a_timm_encoder_runs_as_any_other(name, check):
    check(checks.join(timm_encoder(name), view_size=32))


@torch.no_grad()
def test_taps_are_what_timm_gives_itself(model):
    """Its features before a norm, which it gives of the last block of each of its stages."""
    views = torch.randn(2, *model.grid.view)
    inner = model.vision_tower.timm_model
    settings = {"norm": False, "intermediates_only": True, "output_fmt": "NCHW"}
    for own in inner.forward_intermediates(views, **settings):
        matches = []
        for tap, shape in enumerate(model.grid.shapes):
            if own.shape[1:] != (shape.width, shape.rows, shape.columns):
                continue
            grid = read_grid(model.config.vision_config, model.grid.view[1:], [tap])
            states = read_taps(model.vision_tower, views, grid, [tap])[tap]
            cells = states.transpose(1, 2).unflatten(2, (shape.rows, shape.columns))
            matches.append(torch.equal(cells, own))
        assert any(matches) or own.shape[2] > model.grid.shapes[0].rows  # a stem's, before blocks


@needs_timm
@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 40), (48, 48)])
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_views_of_other_sizes_have_interpolated_positions(name, size):
    encoder = timm_encoder(name)
    model = checks.join(encoder, view_size=size)
    assert (model.grid.rows, model.grid.columns) == (size[0] // 8, size[1] // 8)
    views = torch.randn(2, 3, *size)
    settings = {"norm": False, "intermediates_only": True, "output_fmt": "NLC"}
    own = encoder.timm_model.forward_intermediates(views, **settings)
    for tap, states in read_taps(encoder, views, model.grid, range(1, 5)).items():
        assert torch.equal(states, own[tap - 1])


@needs_timm
def test_a_fixed_encoder_is_made_to_interpolate_only_where_it_is_asked_to():
    fixed = "vit_tiny_patch16_224.fixed"
    for size, flexible in ((None, False), (32, False), ([32, 32], False), (64, True)):
        config = timm_config(fixed)
        prepare_to_load(config, size)
        assert ("dynamic_img_size" in config.model_args) == flexible
        assert read_grid(config, size).view[1:] == ((64, 64) if flexible else (32, 32))
    with pytest.raises(UserError, match=r"view_size is 64.*vit_tiny_patch16_224"):
        read_grid(timm_config(fixed), 64)


def save_as_timm_does(folder, name="vit_tiny_patch16_224.fixed", **values):
    """A folder like timm's repositories on the hub: its own keys, weights without our prefix."""
    from safetensors.torch import save_file

    encoder = timm_encoder(name)
    folder.mkdir()
    head = {"head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}
    save_file(encoder.timm_model.state_dict() | head, folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    config = {"architecture": encoder.config.architecture, "num_classes": 3}
    config |= {"pretrained_cfg": pretrained, "model_args": encoder.config.model_args, **values}
    (folder / "config.json").write_text(json.dumps(config))
    return encoder


@needs_timm
@pytest.mark.parametrize("size", [None, (32, 64)])
def test_a_repository_of_timm_is_built_saved_and_loaded(tmp_path, size):
    own = save_as_timm_does(tmp_path / "encoder")
    folder = str(tmp_path / "encoder")
    language = tiny_language()
    assert read_depths(folder, language) == (4, language.config.num_hidden_layers)
    plan = {"method": "sparsecut", "pattern": "sparse"}
    model, processor = build(folder, language, plan, tokenizer=tiny_tokenizer(), view_size=size)
    for name, value in own.state_dict().items():
        assert torch.equal(model.vision_tower.state_dict()[name], value)
    batch = processor(
        images=[Image.new("RGB", (40, 40), "red")], text="<image> what", return_tensors="pt"
    )
    red = batch["pixel_values"][0, 0, :, 0, 0]
    torch.testing.assert_close(red, torch.tensor([0.5 / 0.2, -0.4 / 0.3, -0.3 / 0.4]))
    save(model, processor, tmp_path / "model")
    again, other = load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert list(other.image_processor.image_mean) == [0.5, 0.4, 0.3]
    cost = count_plan(again.config.vision_config, language.config, plan, view_size=size)
    assert cost.num_image_tokens == model.config.num_image_tokens == (32 if size else 16)


REMOTE = """
import sys, torch
sys.modules["sparsecut"] = None  # not installed
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({folder!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
batch, logits = torch.load({folder!r} + "/expected")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, logits)
assert processor.image_processor.image_mean[0] == 0.5
"""


@needs_timm
def test_the_code_beside_a_saved_model_runs_without_the_package(tmp_path):
    save_as_timm_does(tmp_path / "encoder")
    folder = tmp_path / "model"
    parts = str(tmp_path / "encoder"), tiny_language()
    model, processor = build(*parts, tokenizer=tiny_tokenizer(), view_size=64)
    save(model, processor, folder)
    image = Image.new("RGB", (40, 40), "red")
    batch = dict(processor(images=[image], text="<image> what", return_tensors="pt"))
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), folder / "expected")
    settings = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, "-c", REMOTE.format(folder=str(folder))]
    done = subprocess.run(script, cwd=tmp_path, env=os.environ | settings, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@needs_timm
def test_the_image_processor_of_timm_is_replaced_by_one_that_can_be_saved():
    from transformers import TimmWrapperImageProcessor

    config = timm_config("vit_tiny_patch16_224")
    theirs = TimmWrapperImageProcessor({"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)})
    ours = timm_encoders.make_timm_image_processor(config, theirs)
    assert list(ours.image_mean) == [0.1, 0.2, 0.3]
    given = CLIPImageProcessorPil()
    assert timm_encoders.make_timm_image_processor(config, given) is given
    registered = timm_encoders.make_timm_image_processor(config)
    assert list(registered.image_mean) == [0.5, 0.5, 0.5]  # of this architecture's weights in timm


@needs_timm
@pytest.mark.parametrize(
    ("architecture", "arguments", "sentence"),
    [
        ("hiera_tiny_224", {}, "hiera_tiny_224 is a Hiera"),
        ("vit_tiny_patch16_225", {}, "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"colour": 1}, "colour"),
        ("vit_tiny_patch16_224", {"img_size": 20, "patch_size": 8}, "view_size=16"),
        ("caformer_s18", {}, "caformer_s18"),
    ],
)
def test_an_encoder_of_timm_that_cannot_be_read_is_refused(architecture, arguments, sentence):
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments)
    with pytest.raises(UserError, match=sentence):
        read_grid(config)


@needs_timm
def test_a_view_size_mends_an_encoder_whose_own_views_are_no_whole_number_of_patches():
    config = timm_config("vit_tiny_patch16_224.fixed", img_size=36)
    prepare_to_load(config, 32)
    assert read_grid(config, 32).num_patches == 16
    checks.padded(checks.join(make_encoder(config), view_size=32))


def test_where_timm_is_missing_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}})
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_encoders._try_encoder.cache_clear()
    with pytest.raises(UserError, match=r"sparsecut\[timm\]"):
        read_depths(str(tmp_path), tiny_language())
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"sparsecut\[timm\]"):
        SparseCutConfig(vision_config=config, text_config=language_config("llama"))
