"""Checkpoints of the released SparseCut code as models of this library.

The released code is github.com/DistriAI/SparseCut at commit aed8aaf. It numbers encoder layers from
0 = after the first block, keeps its lists of layers as literals, and saves neither. Arguments here
follow its numbers. The plan of the resulting model holds ours (Hugging Face `hidden_states`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from ..configuration import SparseCutConfig
from ..modeling import SparseCutForConditionalGeneration
from ..plan import Plan, Shortcut
from ..schema import UserError, check_choice

TAPS = (0, 3, 6, 9, 12, 15, 18, 21)
LAYERS = (4, 9, 14, 19, 24, 29, 34, 39)
PLAIN = "mlp2x_gelu"  # LLaVA's projector: no fine views
MIXES = {"cross_mlp": "channels", "cross_attention": "attend", PLAIN: "pick"}

PROJECTOR = "model.mm_projector."
VISION = "model.vision_tower.vision_tower."
PACKED = "attn.in_proj_"  # query, key and value, one above the other
RENAMES = {  # start of a released name in the projector -> its start in the single shared path
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
BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # ends of names that hold no weights


def make_released_plan(
    fusion: str,
    vision_depth: int,
    language_depth: int,
    taps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    input_tap: int = -2,
) -> Plan:
    """Return the released computation as a plan.

    Args:
        fusion: The released projector: "cross_mlp", "cross_attention" or "mlp2x_gelu".
        vision_depth: Number of encoder blocks.
        language_depth: Number of decoder layers.
        taps: Block outputs that are read, from 0 = after the first block. None takes the released
            list, cut to what fires on these depths. An empty list means no shortcuts.
        layers: The decoder layer for each tap. None takes the released list, cut in the same way.
        input_tap: The block output that feeds the input.

    Raises:
        UserError: The projector is not known, or taps and layers do not pair up or fit.
    """
    check_choice("fusion", fusion, MIXES)
    if taps is None:
        # With the plain projector the released code injects the first eight blocks, whatever its
        # list says.
        taps = range(8) if fusion == PLAIN else TAPS
        taps = taps if layers is None else taps[: len(layers)]
    if layers is None:
        fitting = [layer for layer in LAYERS if layer < language_depth]
        layers = fitting[: len(taps)]
        taps = taps[: len(layers)]
    if len(taps) != len(layers):
        raise UserError(
            f"{len(taps)} taps and {len(layers)} layers do not pair up: taps={list(taps)},"
            f" layers={list(layers)}; give one layer for each tap, and leave out those that never"
            " fire"
        )
    mix = MIXES[fusion]
    shortcuts = [Shortcut((_to_state(input_tap),), 0, mix)]
    for tap, layer in zip(taps, layers, strict=True):
        shortcuts.append(Shortcut((_to_state(tap),), layer, mix))
    tiles = 0 if fusion == PLAIN else 2
    plan = Plan(tuple(shortcuts), tiles=tiles, shared=True, norm=False)
    return plan.check(vision_depth, language_depth)


def _to_state(tap: int) -> int:
    """The hidden state of a block output, which counts from 0 = after the first block."""
    return tap + 1 if tap >= 0 else tap


def from_released(
    weights: dict[str, Tensor],
    *,
    vision_config: PreTrainedConfig | dict,
    text_config: PreTrainedConfig | dict,
    fusion: str,
    taps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    input_tap: int = -2,
) -> SparseCutForConditionalGeneration:
    """Build a model with the weights and the computation of a released checkpoint.

    The image placeholder becomes a token appended to the vocabulary, `config.image_token_id`. No
    loss and no decoding sees it.

    Args:
        weights: Tensors under the released names. A vision tower's stand under `VISION`.
        vision_config: The vision tower's configuration.
        text_config: The language model's configuration.
        fusion: "cross_mlp", "cross_attention" or "mlp2x_gelu".
        taps: See `make_released_plan`. The reversed order is [23, 20, ..., 2] with input_tap=0.
        layers: See `make_released_plan`.
        input_tap: See `make_released_plan`.

    Raises:
        UserError: Weights are missing, left over, or do not fit the configurations.
    """
    # Copies: what the caller has stays as it is.
    draft = SparseCutConfig(
        vision_config=copy.deepcopy(vision_config),
        text_config=copy.deepcopy(text_config),
        plan="llava",
    )
    depths = (draft.vision_depth, draft.language_depth)
    plan = make_released_plan(fusion, *depths, taps, layers, input_tap)
    parts = split_weights(weights)
    dtype = next(iter(parts["fusion"].values())).dtype
    language = _build_language_model(draft.text_config, parts["language"], dtype)
    vision = AutoModel.from_config(draft.vision_config, dtype=dtype)
    _load_weights(vision, parts["vision"], "the vision tower")
    config = SparseCutConfig(
        vision_config=draft.vision_config,
        text_config=language.config,
        plan=plan.to_dict(),
        image_token_id=language.config.vocab_size - 1,  # the row just added
        mask_image_token=True,
    )
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    _load_weights(model.fusion.paths[0], parts["fusion"], f"the {fusion} projector")
    model.generation_config = language.generation_config
    return model.to(dtype).eval()


def _build_language_model(config: PreTrainedConfig, weights: dict[str, Tensor], dtype):
    """The language model, with one more row in its vocabulary for the placeholder."""
    language = AutoModelForCausalLM.from_config(config, dtype=dtype)
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    _load_weights(language, weights, "the language model", optional=optional)
    language.resize_token_embeddings(config.vocab_size + 1, mean_resizing=False)
    return language


def split_weights(weights: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort released weights into "vision", "fusion" and "language", under our modules' names.

    Raises:
        UserError: A weight of the projector belongs to none of the released projectors.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "fusion": {}, "language": {}}
    for name, tensor in weights.items():
        if name.startswith(VISION):
            short = name.removeprefix(VISION).removeprefix("vision_model.")
            parts["vision"][short] = tensor
        elif name.startswith(PROJECTOR):
            parts["fusion"] |= _rename_projector(name.removeprefix(PROJECTOR), tensor)
        else:
            parts["language"][name] = tensor
    return parts


def _rename_projector(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith(PACKED):
        kind = name.removeprefix(PACKED)
        width = tensor.shape[0] // 3
        return {
            f"mixer.query.{kind}": tensor[:width],
            f"mixer.key_value.{kind}": tensor[width:],
        }
    for released, ours in RENAMES.items():
        if name.startswith(released):
            return {ours + name.removeprefix(released): tensor}
    raise UserError(
        f"the projector weight {PROJECTOR}{name} belongs to none of the released projectors"
        f" ({', '.join(MIXES)}); give a checkpoint of the released code"
    )


def _load_weights(
    module: nn.Module,
    weights: dict[str, Tensor],
    what: str,
    optional: Iterable[str] = (),
) -> None:
    """Load all of a module's weights, or raise UserError where some are missing or left over."""
    current = module.state_dict()
    names = {name.removeprefix("vision_model."): name for name in current}
    missing = sorted(set(names) - set(weights) - set(optional))
    extra = [name for name in sorted(set(weights) - set(names)) if not name.endswith(BUFFERS)]
    if missing or extra:
        raise UserError(
            f"the weights do not fit {what}: missing {_list_some(missing)}, unknown"
            f" {_list_some(extra)}; check fusion, vision_config and text_config against the"
            " checkpoint"
        )
    loaded = {}
    for short, name in names.items():
        if short not in weights:
            continue
        if weights[short].shape != current[name].shape:
            raise UserError(
                f"{short} of {what} has shape {tuple(weights[short].shape)} in the checkpoint, but"
                f" its configuration makes {tuple(current[name].shape)}; give the configuration"
                " that the checkpoint was trained with"
            )
        loaded[name] = weights[short]
    module.load_state_dict(loaded, strict=not optional)


def _list_some(names: list[str]) -> str:
    more = " and more" if len(names) > 3 else ""
    return f"{', '.join(names[:3]) or 'none'}{more}"
