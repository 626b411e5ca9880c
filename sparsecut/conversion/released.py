"""Checkpoints of the released SparseCut code (DistriAI/SparseCut, commit aed8aaf) as models of
ours.

The released code numbers encoder layers from 0 = after the first block, keeps its layer lists as literals, and saves
neither; the numbers here follow it, and the plan of the resulting model holds ours (Hugging Face `hidden_states`).
"""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from ..configuration import SparseCutConfig
from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan, Shortcut
from ..schema import UserError

TAPS = (0, 3, 6, 9, 12, 15, 18, 21)
LAYERS = (4, 9, 14, 19, 24, 29, 34, 39)
MIXES = {"cross_mlp": "channels", "cross_attention": "attend", "mlp2x_gelu": "pick"}

PROJECTOR = "model.mm_projector."
VISION = "model.vision_tower.vision_tower."
RENAMES = {  # released name in the projector -> ours in the single shared path
    "mlp.0.": "linear_1.",
    "mlp.2.": "linear_2.",
    "attn.out_proj.": "mixer.output.",
    "norm1.": "mixer.norm1.",
    "norm2.": "mixer.norm2.",
    "ffn.0.": "mixer.up.",
    "ffn.2.": "mixer.down.",
    "0.": "linear_1.",  # mlp2x_gelu is a bare sequence
    "2.": "linear_2.",
}


def official_plan(
    fusion: str,
    vision_depth: int,
    language_depth: int,
    taps: list[int] | None = None,
    layers: list[int] | None = None,
    input_tap: int = -2,
) -> Plan:
    """The released computation as a plan; `taps` and `input_tap` index block outputs (0 = after the
    first block).

    None means the released lists cut to what fires on these depths, an empty list no shortcut at
    all.
    """
    if fusion not in MIXES:
        raise UserError(
            f"fusion {fusion!r} is not one of the released code's projectors; allowed are"
            f" {', '.join(MIXES)}"
        )
    if taps is None:
        # With the plain projector the released code injects the first eight blocks, whatever its
        # list says.
        taps = list(range(8)) if fusion == "mlp2x_gelu" else list(TAPS)
        taps = taps if layers is None else taps[: len(layers)]
    if layers is None:
        layers = [d for d in LAYERS if d < language_depth][: len(taps)]
        taps = list(taps)[: len(layers)]
    if len(taps) != len(layers):
        raise UserError(
            f"{len(taps)} taps and {len(layers)} layers do not pair up: taps={list(taps)},"
            f" layers={list(layers)}; give one layer per tap, and leave out those that never fire"
        )
    mix = MIXES[fusion]
    pairs = [(input_tap, 0), *zip(taps, layers, strict=True)]
    shortcuts = tuple(Shortcut((tap + 1 if tap >= 0 else tap,), layer, mix) for tap, layer in pairs)
    plan = Plan(shortcuts, tiles=0 if fusion == "mlp2x_gelu" else 2, shared=True, norm=False)
    return plan.check(vision_depth, language_depth)


def from_official(
    weights: dict[str, Tensor],
    *,
    vision_config: PreTrainedConfig | dict,
    text_config: PreTrainedConfig | dict,
    fusion: str,
    taps: list[int] | None = None,
    layers: list[int] | None = None,
    input_tap: int = -2,
) -> SparseCutForConditionalGeneration:
    """A model of ours with the weights and the computation of a released-code checkpoint.

    weights: tensors under the released names (a separate vision tower's may stand there too, under
    `model.vision_tower. vision_tower.`). fusion: "cross_mlp", "cross_attention" or "mlp2x_gelu".
    taps, layers, input_tap: see `official_plan`; the reversed order is taps=[23, 20, ..., 2],
    input_tap=0. The placeholder becomes a token appended to the vocabulary,
    `config.image_token_id`, that no loss and no decoding sees. Raises ValueError for missing or
    left-over weights.
    """
    vision_config, text_config = (
        copy.deepcopy(vision_config),
        copy.deepcopy(text_config),
    )  # the caller's stay as they are
    shell = SparseCutConfig(vision_config=vision_config, text_config=text_config, plan="llava")
    vision_config, text_config = shell.vision_config, shell.text_config
    plan = official_plan(fusion, shell.vision_depth, shell.language_depth, taps, layers, input_tap)
    parts = split_weights(weights)
    dtype = next(iter(parts["fusion"].values())).dtype
    language = AutoModelForCausalLM.from_config(text_config, dtype=dtype)
    tied = frozenset({"lm_head.weight"}) if text_config.tie_word_embeddings else frozenset()
    _fill(language, parts["language"], "the language model", optional=tied)
    language.resize_token_embeddings(text_config.vocab_size + 1, mean_resizing=False)
    vision = AutoModel.from_config(vision_config, dtype=dtype)
    _fill(vision, parts["vision"], "the vision tower")
    config = SparseCutConfig(
        vision_config=vision_config,
        text_config=language.config,
        plan=plan.to_dict(),
        image_token_id=language.config.vocab_size - 1,  # the row just added
        mask_image_token=True,
    )
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    _fill(model.fusion.paths[0], parts["fusion"], f"the {fusion} projector")
    model.generation_config = language.generation_config
    return model.to(dtype).eval()


def split_weights(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort released names into vision, fusion and language, each under the names its module has
    here.
    """
    parts = {"vision": {}, "fusion": {}, "language": {}}
    for name, tensor in weights.items():
        if name.startswith(VISION):
            parts["vision"][name.removeprefix(VISION).removeprefix("vision_model.")] = tensor
        elif name.startswith(PROJECTOR):
            _add_projector(parts["fusion"], name.removeprefix(PROJECTOR), tensor)
        else:
            parts["language"][name] = tensor
    return parts


def _add_projector(fusion: dict, name: str, tensor: Tensor) -> None:
    if name.startswith("attn.in_proj_"):  # query, key and value packed one above the other
        kind = name.removeprefix("attn.in_proj_")
        width = tensor.shape[0] // 3
        fusion[f"mixer.query.{kind}"], fusion[f"mixer.key_value.{kind}"] = (
            tensor[:width],
            tensor[width:],
        )
        return
    for released, ours in RENAMES.items():
        if name.startswith(released):
            fusion[ours + name.removeprefix(released)] = tensor
            return
    raise UserError(
        f"the projector weight {PROJECTOR}{name} belongs to none of the released projectors"
        f" ({', '.join(MIXES)}); this checkpoint comes from other code"
    )


def _fill(
    module, weights: dict[str, Tensor], what: str, optional: frozenset[str] = frozenset()
) -> None:
    wanted = module.state_dict()
    names = {name.removeprefix("vision_model."): name for name in wanted}
    missing = sorted(set(names) - set(weights) - optional)
    extra = sorted(
        n
        for n in set(weights) - set(names)
        if not n.endswith(("position_ids", "rotary_emb.inv_freq"))
    )
    if missing or extra:
        raise UserError(
            f"the weights do not fit {what}: missing"
            f" {missing[:3] or 'none'}{' and more' * (len(missing) > 3)}, unknown"
            f" {extra[:3] or 'none'}{' and more' * (len(extra) > 3)}; check fusion, vision_config"
            " and text_config against the checkpoint"
        )
    for short, name in names.items():
        if short in weights and weights[short].shape != wanted[name].shape:
            raise UserError(
                f"{short} of {what} has shape {tuple(weights[short].shape)} in the checkpoint, but"
                f" its configuration makes {tuple(wanted[name].shape)}; give the configuration that"
                " the checkpoint was trained with"
            )
    module.load_state_dict(
        {names[short]: w for short, w in weights.items() if short in names}, strict=not optional
    )
