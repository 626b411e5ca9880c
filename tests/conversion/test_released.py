"""What the released code computes, from its stored numbers (case A) and from a plain row-by-row
version of its mathematics.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.released import build_released
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPVisionConfig, LlamaConfig

from sparsecut.conversion.released import LAYERS, TAPS, from_released, make_released_plan
from sparsecut.plan import Shortcut
from sparsecut.schema import UserError

CASE_A = Path(__file__).parents[3] / "shared" / "parity" / "A"
N = 16  # patches per view, here and in case A


def expand_rows(rows: list[list[int]], image_token: int, *, left: bool = False):
    """Rows with -200 placeholders as padded ids with N image tokens each, and their mask."""
    expanded = []
    for row in rows:
        ids = []
        for token in row:
            ids += [image_token] * N if token == -200 else [token]
        expanded.append(torch.tensor(ids))
    side = "left" if left else "right"
    ids = pad_sequence(expanded, batch_first=True, padding_side=side)
    masks = [torch.ones_like(row) for row in expanded]
    return ids, pad_sequence(masks, batch_first=True, padding_side=side)


@pytest.mark.skipif(not CASE_A.is_dir(), reason="the parity files are not here")
def test_case_a():
    meta = json.loads((CASE_A / "meta.json").read_text())
    weights = load_file(CASE_A / "weights.safetensors")
    inputs = load_file(CASE_A / "inputs.safetensors")
    expected = load_file(CASE_A / "outputs.safetensors")
    vision_config = CLIPVisionConfig(**meta["vision_config"])
    text_config = LlamaConfig(**meta["text_config"])
    model = from_released(
        weights, vision_config=vision_config, text_config=text_config, fusion="cross_mlp"
    )
    lengths = inputs["attention_mask"].sum(-1).tolist()
    pairs = zip(inputs["input_ids"], lengths, strict=True)
    rows = [row[:length].tolist() for row, length in pairs]
    ids, mask = expand_rows(rows, model.config.image_token_id)
    is_real = expected["expanded_attention_mask"].bool()
    assert torch.equal(is_real, mask.bool())
    output = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=inputs["images"],
        labels=expected["expanded_labels"],
        output_hidden_states=True,
    )
    features = model.get_image_features(inputs["images"])
    shortcuts = torch.stack([torch.stack(layer) for layer in features.deepstack_features])
    assert_close(torch.stack(features.pooler_output), expected["fused_input"])
    assert_close(shortcuts, expected["fused_shortcuts"])
    assert_close(output.logits[is_real][:, :96], expected["logits"][is_real])
    assert_close(output.loss, expected["loss"][0])
    states = torch.stack(output.hidden_states)
    assert_close(states[0][is_real], expected["inputs_embeds"][is_real])
    layers = expected["llm_layer_output"][:-1]
    assert_close(states[1:-1][:, is_real], layers[:, is_real], atol=3e-4)
    output.loss.backward()
    path = model.fusion.paths[0]
    trained = {
        "model.mm_projector.mlp.0.weight": path.linear_1.weight,
        "model.mm_projector.mlp.0.bias": path.linear_1.bias,
        "model.mm_projector.mlp.2.weight": path.linear_2.weight,
        "model.mm_projector.mlp.2.bias": path.linear_2.bias,
        "model.embed_tokens.weight": model.get_input_embeddings().weight,
    }
    for name, parameter in trained.items():
        gradient = expected[f"grad.{name}"]
        assert_close(parameter.grad[: len(gradient)], gradient)


def assert_close(result, expected, atol: float = 1e-4) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=atol)


@torch.no_grad()
def project(projector, fusion: str, views: torch.Tensor) -> torch.Tensor:
    """The released P(coarse, fine), patch by patch: [views, N, D] of one image -> [N, H]."""
    coarse = views[0]
    if fusion == "mlp2x_gelu":
        return projector(coarse)
    if fusion == "cross_attention":
        keys = views[1:].reshape(1, -1, views.shape[-1])
        x = projector["norm1"](coarse + projector["attn"](coarse[None], keys, keys)[0][0])
        return projector["mlp"](projector["norm2"](x + projector["ffn"](x)))
    rows = []
    for i in range(4):
        for j in range(4):
            window = [(2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)]
            fine = [views[1 + y // 4 * 2 + x // 4, y % 4 * 4 + x % 4] for y, x in window]
            rows.append(torch.cat([coarse[4 * i + j], *fine]))
    return projector["mlp"](torch.stack(rows))


@torch.no_grad()
def compute_plain_row(
    parts, fusion: str, ids: list[int], images: torch.Tensor, taps, layers, input_tap: int
) -> torch.Tensor:
    """Logits of one row by the released mathematics, one layer after the other.

    images: [P, views, 3, S, S].
    """
    tower, projector, language = parts
    fused = []
    for image in images:
        blocks = tower(image, output_hidden_states=True).hidden_states[1:]
        needed = {*taps, input_tap}
        fused.append({tap: project(projector, fusion, blocks[tap][:, 1:]) for tap in needed})
    embeddings = []
    starts = []
    for token in ids:
        if token == -200:
            features = fused[len(starts)]
            starts.append(len(embeddings))
            embeddings += list(features[input_tap])
        else:
            embeddings.append(language.model.embed_tokens.weight[token])
    h = torch.stack(embeddings)[None]
    positions = torch.arange(h.shape[1])[None]
    rotary = language.model.rotary_emb(h, positions)
    layer_taps = dict(zip(layers, taps, strict=True))
    for number, layer in enumerate(language.model.layers):
        if number in layer_taps:
            h = h.clone()
            for start, features in zip(starts, fused, strict=True):
                h[0, start : start + N] += features[layer_taps[number]]
        h = layer(h, position_embeddings=rotary, position_ids=positions)
    return language.lm_head(language.model.norm(h))[0]


REVERSED = [23 - tap for tap in TAPS]
LEFT_PADDED = ("attention", "32 layers")
CASES = {
    "attention": ("cross_attention", 40, None, None, -2),
    "LLaVA": ("mlp2x_gelu", 40, [], [], -2),
    "plain projector, first eight blocks": ("mlp2x_gelu", 40, None, None, -2),
    "reversed": ("cross_mlp", 40, REVERSED, None, 0),
    "32 layers": ("cross_mlp", 32, None, None, -2),
    "other lists": ("cross_mlp", 32, [0, 1, 3, 6, 9, 13, 18, 23], [0, 2, 4, 8, 12, 18, 24, 31], -2),
}


def get_fired(fusion: str, depth: int, taps, layers) -> tuple[list[int], list[int]]:
    """The taps and layers of the released code that fire on a decoder of this depth."""
    if taps is None:
        taps = range(8) if fusion == "mlp2x_gelu" else TAPS
    pairs = zip(taps, LAYERS if layers is None else layers, strict=True)
    fired = [(tap, layer) for tap, layer in pairs if layer < depth]
    return [tap for tap, _ in fired], [layer for _, layer in fired]


@pytest.mark.parametrize("case", CASES)
def test_released_variants(case):
    fusion, depth, taps, layers, input_tap = CASES[case]
    weights, configs, parts = build_released(fusion, depth)
    lists = {"taps": taps, "layers": layers, "input_tap": input_tap}
    model = from_released(weights, **configs, fusion=fusion, **lists)
    torch.manual_seed(1)
    images = torch.randn(3, 1 if fusion == "mlp2x_gelu" else 5, 3, 32, 32)
    # A text-only row first, two images in the last.
    rows = [[1, 5, 7], [1, -200, 9], [1, 4, -200, 8, -200, 6, 3]]
    row_images = [images[:0], images[:1], images[1:]]
    ids, mask = expand_rows(rows, model.config.image_token_id, left=case in LEFT_PADDED)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, pixel_values=images)
    taps, layers = get_fired(fusion, depth, taps, layers)
    for i, row in enumerate(rows):
        expected = compute_plain_row(parts, fusion, row, row_images[i], taps, layers, input_tap)
        assert_close(output.logits[i, mask[i].bool(), :50], expected)


@pytest.fixture(scope="module")
def cross_mlp():
    """Weights, configurations and parts of the released form with channels."""
    return build_released("cross_mlp")


def test_greedy_tokens_equal_those_of_repeated_plain_passes(cross_mlp):
    weights, configs, parts = cross_mlp
    model = from_released(weights, **configs, fusion="cross_mlp")
    image = torch.randn(1, 5, 3, 32, 32)
    row = [1, 4, -200, 8]
    ids, mask = expand_rows([row], model.config.image_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": image}
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for token in output[0, ids.shape[1] :].tolist():
        logits = compute_plain_row(parts, "cross_mlp", row, image, TAPS, LAYERS, -2)
        assert int(logits[-1].argmax()) == token
        row.append(token)


def test_the_placeholder_is_appended_and_has_no_probability(cross_mlp):
    weights, configs, _ = cross_mlp
    model = from_released(weights, **configs, fusion="cross_mlp")
    assert model.config.image_token_id == 50 and configs["text_config"].vocab_size == 50
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert F.softmax(logits, -1)[..., 50].max() == 0


@pytest.mark.parametrize("is_shifted", [False, True])
def test_labels_at_image_tokens_do_not_count(cross_mlp, is_shifted):
    weights, configs, _ = cross_mlp
    model = from_released(weights, **configs, fusion="cross_mlp").train()
    ids, mask = expand_rows([[1, 4, -200, 8, 9]], model.config.image_token_id)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(1, 5, 3, 32, 32),
    }

    def compute_loss(labels, **more):
        if is_shifted:
            more["shift_labels"] = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return model(**inputs, labels=labels, **more).loss

    placeholders = ids == model.config.image_token_id
    hidden = ids.masked_fill(placeholders, -100)
    assert placeholders.sum() > 1 and compute_loss(ids).isfinite()
    assert torch.equal(compute_loss(ids), compute_loss(hidden))
    assert torch.equal(*(compute_loss(x, num_items_in_batch=9) for x in (ids, hidden)))
    compute_loss(ids).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_lists_are_cut_to_what_fires():
    plan = make_released_plan("cross_mlp", 24, 32)
    assert [s.layer for s in plan.shortcuts] == [0, 4, 9, 14, 19, 24, 29]
    assert plan.shortcuts[1] == Shortcut((1,), 4, "channels")
    assert make_released_plan("mlp2x_gelu", 24, 40, [], []).tiles == 0
    with pytest.raises(UserError, match=r"taps=\[0, 3\], layers=\[4\]"):
        make_released_plan("cross_mlp", 24, 40, [0, 3], [4])
    with pytest.raises(UserError, match="layer 39"):
        make_released_plan("cross_mlp", 24, 32, [0], [39])
    with pytest.raises(UserError, match=r"'mlp'.*cross_mlp"):
        make_released_plan("mlp", 24, 32)


def test_weights_that_do_not_fit_are_named(cross_mlp):
    weights, configs, _ = cross_mlp
    with pytest.raises(UserError, match="cross_attention"):
        from_released(weights, **configs, fusion="cross_attention")
    unknown = {**weights, "model.mm_projector.gate": torch.zeros(1)}
    with pytest.raises(UserError, match=r"mm_projector\.gate"):
        from_released(unknown, **configs, fusion="cross_mlp")
