"""Other papers' methods as whole models: trained, generating, saved, counted."""

import pytest
import torch
from helpers import checks
from helpers.fusions import DIM, HIDDEN, features, fuse, fusion
from helpers.runs import recipe, stage, write_records
from helpers.tiny import tiny_language, tiny_model, tiny_vision
from PIL import Image
from torch import nn

from sparsecut import Plan, Shortcut, replan
from sparsecut.building import build, load, save
from sparsecut.methods import make_plan
from sparsecut.profiling.counting import count_plan
from sparsecut.profiling.dry_run import dry_run
from sparsecut.schema import UserError
from sparsecut.training.stages import train

NEW = {
    "cli": {"method": "cli", "rank": 3},
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
    for parameter in model.fusion.context.parameters():
        nn.init.normal_(parameter, std=0.5)
    for correction in model.fusion.corrections.values():
        nn.init.normal_(correction.up.weight, std=0.5)
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


@torch.no_grad()
def test_a_row_of_audio_frames_is_pooled_two_by_two():
    model = checks.join(vision="whisper", plan="molmo")
    grid = model.config.grid
    windows = -(-grid.rows // 2) * -(-grid.columns // 2)
    assert model.config.num_image_tokens == windows < grid.num_patches
    checks.padded(model)


def make_cli(**settings):
    """A CLI-like fusion of taps 1 and 3 into layers 2 and 4, no weight at its start."""
    pairs = [Shortcut((tap,), layer) for layer in (2, 4) for tap in (1, 3)]
    settings = {"tiles": 0, "shared": True, "rank": 2, "tied": True, **settings}
    module = fusion(Shortcut((4,), 0), *pairs, **settings)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def gate_by_hand(gate, features, hidden, start):
    """The gated sum of one image, in plain words: features of each tap [N, H], hidden [N, H]."""
    scale = hidden.shape[-1] ** -0.5

    def summarize(tokens, query):
        weights = torch.stack([scale * (token @ query) for token in tokens]).softmax(0)
        summary = sum(weight * token for weight, token in zip(weights, tokens, strict=True))
        return (summary - summary.mean()) / (summary.var(unbiased=False) + 1e-5).sqrt()

    total = torch.zeros_like(hidden)
    for number, tokens in enumerate(features):
        both = [summarize(tokens, gate.query_features), summarize(hidden, gate.query_hidden)]
        score = gate.weight[number] @ torch.cat(both) + gate.bias[number]
        total = total + (2 * score.sigmoid() + start - 1) * tokens
    return total


@pytest.mark.parametrize(("name", "start"), [("context", 1), ("context_zero", 0)])
def test_cli_adds_a_gated_sum_of_every_layer_corrected_once_to_every_layer(name, start):
    module = make_cli(gate=name)
    assert list(module.corrections) == ["1", "2"] and len(module.paths) == 1
    x = features((1, 3, 4), tiles=0)
    (path,) = module.paths
    projected = {}
    for tap, key in ((1, "1"), (3, "2")):
        correction = module.corrections[key]
        raw = x[tap][:, 0]
        inner = nn.functional.gelu(raw @ path.linear_1.weight.T + path.linear_1.bias)
        mlp = inner @ path.linear_2.weight.T + path.linear_2.bias
        projected[tap] = mlp + raw @ correction.down.weight.T @ correction.up.weight.T
    fused = fuse(module, x)
    hidden = torch.randn(2, 4, HIDDEN)
    for layer in (2, 4):
        gate = module.context[str(layer)]
        added = gate(hidden.flatten(0, 1), fused[layer].flatten(0, 1), 4).unflatten(0, (2, 4))
        for image in range(2):
            each = [projected[tap][image] for tap in (1, 3)]
            expected = gate_by_hand(gate, each, hidden[image], start)
            torch.testing.assert_close(added[image], expected, atol=1e-5, rtol=1e-4)
        assert gate(hidden.flatten(0, 1), fused[layer].flatten(0, 1), 4).shape == (8, HIDDEN)


def test_projections_of_equal_taps_are_computed_once():
    module = make_cli()
    rows = []
    module.paths[0].linear_1.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    fused = fuse(module, features((1, 3, 4), tiles=0, images=2))
    assert rows == [3 * 2]  # three taps of two images, not five shortcuts
    assert torch.equal(fused[2], fused[4])
    assert sum(p.numel() for p in module.corrections.parameters()) == 2 * 2 * (DIM + HIDDEN)
    with module.switched_off(1, 4):
        alone = fuse(module, features((1, 3, 4), tiles=0))
    assert torch.allclose(alone[2] + alone[4], fused[2], atol=1e-6)


def test_tied_shortcuts_without_sharing_have_a_projector_for_each_of_their_taps():
    pairs = [Shortcut((tap,), layer, "channels") for layer in (1, 3) for tap in (2, -3)]
    module = fusion(Shortcut((-1,), 0), *pairs, tied=True, gate="zero_projector")
    assert module.groups == [[0], [1, 3], [2, 4]]
    zeros = [parameter for parameter, start in module.initial_values() if start == (0.0, 0.0)]
    for number, path in enumerate(module.paths):
        is_zero = any(parameter is path.linear_2.weight for parameter in zeros)
        assert is_zero == (number > 0)
    same = fusion(Shortcut((2,), 0), Shortcut((-4,), 1), tied=True)  # of five blocks
    assert same.groups == [[0, 1]]


@pytest.mark.parametrize("settings", [{"gate": "zero_projector"}, {"rank": 2}])
def test_what_is_tied_to_the_input_cannot_have_a_start_of_its_own(settings):
    plan = Plan((Shortcut((-2,), 0), Shortcut((4,), 1)), tied=True, **settings)
    plan.check(6, 4)
    with pytest.raises(UserError, match="tied=True"):
        plan.check(5, 4)


def test_cli_is_many_to_many_and_its_earlier_form_is_kept():
    plan = make_plan("cli", 24, 32)
    taps = {s.taps for s in plan.shortcuts[1:]}
    assert len(taps) == len(plan.layers) == 8 and plan.tied
    assert {(s.taps, s.layer) for s in plan.shortcuts[1:]} == {
        (tap, layer) for tap in taps for layer in plan.layers
    }
    before = make_plan({"method": "cli", "pairs": "one"}, 24, 32)
    assert [(s.taps[0], s.layer) for s in before.shortcuts[1:4]] == [(1, 3), (4, 7), (7, 11)]
    assert "tied" not in before.to_dict() and plan.to_dict()["tied"] is True
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.fixture
def trained():
    """A model of the method `llava` with weights away from their start, and a prompt for it."""
    model, processor = tiny_model("llava")
    for parameter in model.fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    inputs = processor(
        images=[Image.effect_noise((24, 24), 90).convert("RGB")],
        text=processor.image_token + " what is it",
        return_tensors="pt",
    )
    return model, processor, inputs


@torch.no_grad()
def test_cli_starts_as_the_trained_model_and_every_tap_goes_through_its_projector(trained):
    model, processor, inputs = trained
    projector = {n: x.clone() for n, x in model.fusion.paths[0].state_dict().items()}
    expected = model(**inputs).logits
    plan = {"method": "cli", "gate": "context_zero", "rank": 3}
    made, _ = replan(model, processor, plan)
    assert torch.equal(made(**inputs).logits, expected)
    (path,) = made.fusion.paths
    assert all(torch.equal(x, projector[n]) for n, x in path.state_dict().items())
    states = made.encode(inputs["pixel_values"])
    fused = made.fusion(states)
    taps = [s.taps[0] for s in made.plan.shortcuts[1:] if s.layer == made.plan.layers[0]]
    each = [path.project(states[tap][:, 0]) for tap in taps]
    torch.testing.assert_close(fused[1], torch.cat(each, -1))  # MLP(V_k), corrections at zero
    for gate in made.fusion.context.values():
        gate.bias += 0.5
    assert not torch.allclose(made(**inputs).logits, expected, atol=1e-3)


def test_gates_that_start_at_zero_learn_at_once_and_the_rest_follows(trained):
    model, processor, inputs = trained
    made, _ = replan(model, processor, {"method": "cli", "gate": "context_zero", "rank": 3})
    optimizer = torch.optim.SGD(made.fusion.parameters(), lr=0.1)
    moved = {}
    for step in range(3):
        optimizer.zero_grad()
        made(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, parameter in made.fusion.named_parameters():
            if parameter.grad is not None and parameter.grad.any():
                moved.setdefault(name, step)
        optimizer.step()
    assert all(moved[f"context.{layer}.weight"] == 0 for layer in made.plan.layers)
    assert {name for name, _ in made.fusion.named_parameters()} == set(moved)


def test_replan_gives_the_processor_the_new_views_and_the_model_is_saved(trained, tmp_path):
    model, processor, inputs = trained
    plan = {"method": "sparsecut", "norm": False, "gate": "zero_projector", "count": 2}
    expected = model(**inputs).logits
    made, changed = replan(model, processor, plan)
    assert (processor.tiles, changed.tiles) == (0, 2)
    image = [Image.effect_noise((24, 24), 90).convert("RGB")]
    given = changed(images=image, text=processor.image_token + " what is it", return_tensors="pt")
    assert given["pixel_values"].shape[1] == 5
    given["pixel_values"][:, 0] = inputs["pixel_values"][:, 0]
    assert torch.equal(made(**given).logits, expected)
    save(made, changed, tmp_path)
    again, _ = load(tmp_path)
    assert again.plan == made.plan
    assert torch.equal(again(**given).logits, expected)


@pytest.mark.parametrize(
    ("plan", "fact"),
    [
        ({"method": "cli", "norm": True}, "norm=True"),
        ("hires_channels", "channels"),
        ("qwen3_vl", "[6]"),
    ],
)
def test_a_plan_whose_input_reads_something_else_is_refused(trained, plan, fact):
    model, processor, _ = trained
    with pytest.raises(UserError) as error:
        replan(model, processor, plan)
    assert fact in str(error.value) and "norm=False" in str(error.value)


def test_a_recipe_puts_a_new_plan_into_a_saved_model_and_counts_it(trained, tmp_path):
    model, processor, _ = trained
    save(model, processor, tmp_path / "base")
    write_records(tmp_path)
    plan = {"method": "cli", "gate": "context_zero", "rank": 3}
    source = {"base": str(tmp_path / "base"), "replan": True}
    whole = recipe(tmp_path, stage(tmp_path), model=source, fusion=plan)
    (estimated,) = dry_run(whole)
    made, _ = train(whole, shown=False)
    real = sum(parameter.numel() for parameter in made.fusion.parameters())
    assert estimated.trained == {"fusion": real}
    assert made.plan == make_plan(plan, 6, 4)
    assert any(correction.up.weight.any() for correction in made.fusion.corrections.values())
    again, _ = train(whole, resume=True, shown=False)  # it is complete
    assert again.plan == made.plan
    with pytest.raises(UserError, match="replan"):
        train(recipe(tmp_path, model={"base": source["base"]}, fusion=plan), overwrite=True)
