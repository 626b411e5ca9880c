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
from transformers import CLIPVisionConfig, LlamaConfig

from sparsecut.conversion.released import LAYERS, TAPS, from_official, official_plan
from sparsecut.plan import Shortcut

CASE_A = Path(__file__).parents[3] / "shared" / "parity" / "A"
N = 16  # patches per view, here and in case A


def opened(rows: list[list[int]], image_token: int, fill: int = 0, left: bool = False):
    """Rows with -200 placeholders as padded ids with N image tokens each, and their mask."""
    rows = [[x for t in row for x in ([image_token] * N if t == -200 else [t])] for row in rows]
    longest = max(map(len, rows))
    pads = [[fill] * (longest - len(row)) for row in rows]
    ids = [p + r if left else r + p for p, r in zip(pads, rows, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
        for p, r in zip(pads, rows, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.skipif(not CASE_A.is_dir(), reason="the parity files are not here")
def test_case_a():
    meta = json.loads((CASE_A / "meta.json").read_text())
    weights, given, want = (
        load_file(CASE_A / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")
    )
    configs = {
        "vision_config": CLIPVisionConfig(**meta["vision_config"]),
        "text_config": LlamaConfig(**meta["text_config"]),
    }
    model = from_official(weights, **configs, fusion="cross_mlp")
    lengths = given["attention_mask"].sum(-1).tolist()
    rows = [row[:n].tolist() for row, n in zip(given["input_ids"], lengths, strict=True)]
    ids, mask = opened(rows, model.config.image_token_id)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=given["images"],
        labels=want["expanded_labels"],
        output_hidden_states=True,
    )
    real = want["expanded_attention_mask"].bool()
    assert torch.equal(real, mask.bool())
    features = model.get_image_features(given["images"])
    shortcuts = torch.stack([torch.stack(z) for z in features.deepstack_features])
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(torch.stack(features.pooler_output), want["fused_input"], **close)
    torch.testing.assert_close(shortcuts, want["fused_shortcuts"], **close)
    torch.testing.assert_close(out.logits[real][:, :96], want["logits"][real], **close)
    torch.testing.assert_close(out.loss, want["loss"][0], **close)
    states = torch.stack(out.hidden_states)
    assert (states[0] - want["inputs_embeds"])[real].abs().max() < 1e-4
    assert (states[1:-1] - want["llm_layer_output"][:-1])[:, real].abs().max() < 3e-4
    out.loss.backward()
    path = model.fusion.paths[0]
    for ours, name in (
        (path.linear_1.weight, "model.mm_projector.mlp.0.weight"),
        (path.linear_1.bias, "model.mm_projector.mlp.0.bias"),
        (path.linear_2.weight, "model.mm_projector.mlp.2.weight"),
        (path.linear_2.bias, "model.mm_projector.mlp.2.bias"),
        (model.get_input_embeddings().weight, "model.embed_tokens.weight"),
    ):
        expected = want[f"grad.{name}"]
        assert (ours.grad[: len(expected)] - expected).abs().max() < 1e-4, name
    assert all(
        p.grad is None or not p.grad.any()
        for p in model.vision_tower.parameters()
        if not p.requires_grad
    )


@torch.no_grad()
def project(projector, fusion: str, views: torch.Tensor) -> torch.Tensor:
    """The released P(coarse, fine), patch by patch: [views, N, D] of one picture -> [N, H]."""
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
def plain_row(
    parts, fusion: str, ids: list[int], pictures: torch.Tensor, taps, layers, input_tap: int
) -> torch.Tensor:
    """Logits of one row by the released mathematics, one layer after the other; pictures [P, views,
    3, S, S].
    """
    tower, projector, language = parts
    blocks = [tower(p, output_hidden_states=True).hidden_states[1:] for p in pictures]
    fused = [
        {v: project(projector, fusion, b[v][:, 1:]) for v in {*taps, input_tap}} for b in blocks
    ]
    h, places, pictures_left = [], [], list(fused)
    for t in ids:
        if t == -200:
            places.append(len(h))
            h += list(pictures_left.pop(0)[input_tap])
        else:
            h.append(language.model.embed_tokens.weight[t])
    h = torch.stack(h)[None]
    positions = torch.arange(h.shape[1])[None]
    rotary = language.model.rotary_emb(h, positions)
    for number, layer in enumerate(language.model.layers):
        for tap, target in zip(taps, layers, strict=True):
            if target == number:
                h = h.clone()
                for start, features in zip(places, fused, strict=True):
                    h[0, start : start + N] += features[tap]
        h = layer(h, position_embeddings=rotary, position_ids=positions)
    return language.lm_head(language.model.norm(h))[0]


REVERSED = [23 - s for s in TAPS]
CASES = {
    "attention": ("cross_attention", 40, None, None, -2),
    "plain LLaVA": ("mlp2x_gelu", 40, [], [], -2),
    "plain projector, first eight blocks": ("mlp2x_gelu", 40, None, None, -2),
    "reversed": ("cross_mlp", 40, REVERSED, None, 0),
    "32 layers": ("cross_mlp", 32, None, None, -2),
    "other lists": ("cross_mlp", 32, [0, 1, 3, 6, 9, 13, 18, 23], [0, 2, 4, 8, 12, 18, 24, 31], -2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("left", [False, True], ids=["right-padded", "left-padded"])
def test_released_variants(case, left):
    fusion, depth, taps, layers, input_tap = CASES[case]
    weights, configs, parts = build_released(fusion, depth)
    model = from_official(
        weights, **configs, fusion=fusion, taps=taps, layers=layers, input_tap=input_tap
    )
    torch.manual_seed(1)
    num_views = 1 if fusion == "mlp2x_gelu" else 5
    pictures = torch.randn(3, num_views, 3, 32, 32)
    rows = [
        [1, 5, 7],
        [1, -200, 9],
        [1, 4, -200, 8, -200, 6, 3],
    ]  # a text-only row first, two pictures in the last
    owned = [pictures[:0], pictures[:1], pictures[1:]]
    ids, mask = opened(rows, model.config.image_token_id, left=left)
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pictures).logits[..., :50]
    if taps is None:
        taps = range(8) if fusion == "mlp2x_gelu" else TAPS
    layers = LAYERS if layers is None else layers
    fired = [(t, d) for t, d in zip(taps, layers, strict=True) if d < depth]
    taps, layers = [t for t, _ in fired], [d for _, d in fired]
    for row, mine, line, keep in zip(rows, owned, logits, mask.bool(), strict=True):
        want = plain_row(parts, fusion, row, mine, taps, layers, input_tap)
        torch.testing.assert_close(line[keep], want, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_those_of_repeated_plain_passes():
    weights, configs, parts = build_released("cross_mlp")
    model = from_official(weights, **configs, fusion="cross_mlp")
    picture = torch.randn(1, 5, 3, 32, 32)
    ids, mask = opened([[1, 4, -200, 8]], model.config.image_token_id)
    out = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=picture, max_new_tokens=6, do_sample=False
    )
    row = [1, 4, -200, 8]
    for _ in range(6):
        row.append(int(plain_row(parts, "cross_mlp", row, picture, TAPS, LAYERS, -2)[-1].argmax()))
    assert out[0, ids.shape[1] :].tolist() == row[4:]


def test_the_placeholder_is_appended_and_has_no_probability():
    weights, configs, _ = build_released("cross_mlp")
    model = from_official(weights, **configs, fusion="cross_mlp")
    assert model.config.image_token_id == 50 and configs["text_config"].vocab_size == 50
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert F.softmax(logits, -1)[..., 50].max() == 0


def test_lists_are_cut_to_what_fires():
    plan = official_plan("cross_mlp", 24, 32)
    assert [s.layer for s in plan.shortcuts] == [0, 4, 9, 14, 19, 24, 29]
    assert plan.shortcuts[1] == Shortcut((1,), 4, "channels")
    assert official_plan("mlp2x_gelu", 24, 40, [], []).tiles == 0
    with pytest.raises(ValueError, match="do not pair up"):
        official_plan("cross_mlp", 24, 40, [0, 3], [4])
    with pytest.raises(ValueError, match="adds to layer 39"):
        official_plan("cross_mlp", 24, 32, [0], [39])
    with pytest.raises(ValueError, match="projectors; allowed are cross_mlp"):
        official_plan("mlp", 24, 32)


def test_weights_that_do_not_fit_are_named():
    weights, configs, _ = build_released("cross_mlp")
    with pytest.raises(ValueError, match="do not fit the cross_attention projector"):
        from_official(weights, **configs, fusion="cross_attention")
    weights["model.mm_projector.gate"] = torch.zeros(1)
    with pytest.raises(ValueError, match="belongs to none of the released projectors"):
        from_official(weights, **configs, fusion="cross_mlp")
