"""Other papers' methods as whole models: trained, generating, saved, counted."""

import pytest
import torch
from helpers import checks
from helpers.tiny import tiny_language, tiny_model, tiny_vision
from PIL import Image
from torch import nn

from sparsecut.building import build, load, save
from sparsecut.methods import make_plan
from sparsecut.profiling.counting import count_plan

NEW = {
    "external_direct": "external_direct",
    "external_all": {"method": "external_direct", "states": "all"},
    "molmo": "molmo",
    "blend": {"shortcuts": [{"taps": [1, 3, -2], "layer": 0, "mix": "blend"}]},
    "blend of both views": {
        "tiles": 2,
        "shortcuts": [{"taps": [1, -2], "layer": 0, "mix": "blend"}],
    },
}


@pytest.mark.parametrize("name", NEW)
def test_a_peer_trains_and_generates_like_any_model(name):
    model = checks.join(plan=NEW[name])
    checks.gradients(model)
    checks.cached(model)
    checks.padded(model)


@pytest.mark.parametrize("name", NEW)
def test_a_peer_is_saved_loaded_and_counted(name, tmp_path):
    model, processor = tiny_model(NEW[name])
    for parameter in model.fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    save(model, processor, tmp_path)
    again, _ = load(tmp_path)
    inputs = processor(
        images=[Image.effect_noise((24, 24), 90).convert("RGB")],
        text=processor.image_token + " what is it",
        return_tensors="pt",
    )
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    cost = count_plan(model.config.vision_config, model.config.text_config, NEW[name])
    real = sum(parameter.numel() for parameter in model.fusion.parameters())
    assert cost.num_fusion_parameters == real
    assert cost.num_image_tokens == model.config.num_image_tokens


def test_external_direct_is_a_projector_of_three_states_side_by_side():
    model = checks.join(plan="external_direct")
    depth = model.config.vision_depth
    taps = make_plan("external_direct", depth, 4).shortcuts[0].taps
    pixels = checks.batch(model)["pixel_values"]
    with torch.no_grad():
        states = model.vision_tower(
            pixel_values=pixels.flatten(0, 1), output_hidden_states=True
        ).hidden_states
        x = torch.cat([states[tap][:, 1:] for tap in taps], dim=-1)
        path = model.fusion.paths[0]
        inner = nn.functional.gelu(path.linear_1(x))
        expected = path.linear_2(inner)
        found = torch.stack(model.get_image_features(pixels).pooler_output)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coarse", ["squash", "native"])
def test_an_odd_grid_is_pooled_with_windows_that_stand_over(coarse):
    vision = tiny_vision()
    vision.config.image_size = 24  # 3 x 3 patches
    vision = type(vision)(vision.config).eval()
    _, processor = tiny_model()
    settings = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    model, processor = build(vision, tiny_language(), "molmo", coarse=coarse, **settings)
    assert model.config.num_image_tokens == 4
    text = processor.image_token + " what is it"
    image = Image.effect_noise((40, 24), 90).convert("RGB")
    inputs = processor(images=[image], text=text, return_tensors="pt")
    counted = int((inputs["input_ids"] == model.config.image_token_id).sum())
    given = {n: inputs[n] for n in ("pixel_values", "image_grids") if n in inputs}
    with torch.no_grad():
        (features,) = model.get_image_features(**given).pooler_output
        model(**inputs)
    assert counted == len(features) == (4 if coarse == "squash" else counted)
