"""Putting models together: from two names or modules, or from a saved folder."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save

from .adapters import load_adapters
from .configuration import SparseCutConfig, SparseCutUpgradeConfig
from .encoders import encoder_of, is_audio
from .hooks import check_language_model
from .modeling import SparseCutForConditionalGeneration
from .modeling_upgraded import FACTS
from .plan import Plan
from .processing import SparseCutAudioProcessor, SparseCutProcessor, check_extractor
from .schema import UserError
from .upgrading import HUB_ARGUMENTS, load_fusion, read_processor

logger = logging.getLogger(__name__)

SHAPES_WEIGHTS = Path(__file__).parent / "shapes" / "weights"
SHAPES = "shapes"  # names the built-in small backbones
OLD_SHAPES = "world"  # their former name
# Where the Auto classes find the code that is saved with a model or a processor: by the name of its
# class, or by its module for the processors of upgraded models, which keep their base's class name.
AUTO_MAPS = {
    "modeling": {
        "AutoConfig": "configuration.SparseCutConfig",
        "AutoModel": "modeling.SparseCutModel",
        "AutoModelForImageTextToText": "modeling.SparseCutForConditionalGeneration",
    },
    "modeling_upgraded": {
        "AutoConfig": "configuration.SparseCutUpgradeConfig",
        "AutoModel": "modeling_upgraded.SparseCutUpgradeModel",
        "AutoModelForImageTextToText": "modeling_upgraded.SparseCutUpgrade",
    },
    "SparseCutAudioProcessor": {"AutoProcessor": "processing.SparseCutAudioProcessor"},
    "SparseCutProcessor": {"AutoProcessor": "processing.SparseCutProcessor"},
    "processing_upgraded": {"AutoProcessor": "processing_upgraded.SparseCutUpgradeProcessor"},
}


def build(
    vision: str | nn.Module,
    language: str | nn.Module,
    plan: str | dict | Plan = "sparsecut",
    *,
    image_processor=None,
    tokenizer=None,
    image_token: str | None = None,
    coarse: str = "squash",
    view_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | str = torch.float32,
    **from_pretrained,
) -> tuple[SparseCutForConditionalGeneration, SparseCutProcessor | SparseCutAudioProcessor]:
    """Join a vision encoder and a causal language model by a plan; nothing of either is copied or
    changed.

    vision, language: hub names, folders, "shapes" (the built-in small backbones), or loaded modules
    (then hand over image_processor and tokenizer too; of an encoder that listens, its feature
    extractor is the image_processor).
    plan: a method's name, {"method": ..., options} or a plan. image_token: the placeholder, by
    default "<image>", or "<audio>".
    view_size: pixels of a view, or (height, width), for encoders of pictures of any size. Further
    arguments (attn_implementation, device_map, token, ...) go to both `from_pretrained`. The plan
    is checked before any weight is loaded. Returns (model, processor), the model in evaluation
    mode. Raises ValueError for what cannot be joined.
    """
    vision, language = resolve(vision, "vision"), resolve(language, "language")
    hub = {name: value for name, value in from_pretrained.items() if name in HUB_ARGUMENTS}
    vision_config, text_config = (
        _config_of(vision, "vision", hub),
        _config_of(language, "language", hub),
    )
    if hasattr(vision_config, "vision_config"):  # a two-tower checkpoint such as CLIP's
        vision_config = vision_config.vision_config
        vision = vision if isinstance(vision, str) else _encoder_in(vision, vision_config)
    config = SparseCutConfig(
        vision_config=vision_config,
        text_config=text_config,
        plan=_as_dict(plan),
        view_size=view_size,
    )
    listens = is_audio(vision_config)
    image_token = image_token or ("<audio>" if listens else "<image>")
    tokenizer = tokenizer or _for_name(AutoTokenizer, language, "tokenizer", hub)
    preparing = AutoFeatureExtractor if listens else AutoImageProcessor
    image_processor = image_processor or _for_name(preparing, vision, "image_processor", hub)
    if listens:
        check_extractor(image_processor, config.grid)
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    if isinstance(vision, str):
        vision = _load_encoder(vision, vision_config, dtype, from_pretrained)
    vision = encoder_of(vision)
    if isinstance(language, str):
        language = AutoModelForCausalLM.from_pretrained(
            language, config=text_config, dtype=dtype, **from_pretrained
        )
    check_language_model(language)
    for module in (*vision.modules(), *language.modules()):
        module._is_hf_initialized = True  # ready weights are not drawn anew
    if language.get_input_embeddings().num_embeddings <= config.image_token_id:
        language.resize_token_embeddings(config.image_token_id + 1)
    config.vision_config, config.text_config = (
        vision.config,
        language.config,
    )  # as they are now, the new size included
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    model.fusion.to(next(language.parameters()).dtype)
    model.generation_config = _generation_config(language, tokenizer, config.image_token_id)
    return model.eval(), _processor_for(config, image_processor, tokenizer, image_token, coarse)


def _generation_config(language: nn.Module, tokenizer, image_token_id: int):
    """The language model's own, which never says the placeholder and has a token to pad with."""
    config = copy.deepcopy(language.generation_config)
    config.suppress_tokens = [*(config.suppress_tokens or []), image_token_id]
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _processor_for(
    config: SparseCutConfig, image_processor, tokenizer, image_token: str, coarse: str
):
    if is_audio(config.vision_config):
        return SparseCutAudioProcessor(
            image_processor,
            tokenizer,
            num_audio_tokens=config.num_image_tokens,
            audio_token=image_token,
        )
    return SparseCutProcessor(
        image_processor,
        tokenizer,
        image_size=config.image_size,
        tiles=config.get_plan().tiles,
        num_image_tokens=config.num_image_tokens,
        coarse=coarse,
        image_token=image_token,
    )


def load(
    folder: str | Path, base=None, *, processor=None, **from_pretrained
) -> tuple[PreTrainedModel, object]:
    """A saved model and its processor, in evaluation mode; a folder or a hub name.

    A folder of saved shortcuts (`save_fusion`) is loaded onto the base it names, or onto the one
    given with its processor; see `upgrading.load_fusion`. Adapters kept beside a model come back on
    it. Raises ValueError for what is no saved model, and for shortcuts of another base.
    """
    if (Path(folder) / FACTS).is_file():
        model, processor = load_fusion(folder, base, processor=processor, **from_pretrained)
        load_adapters(model, Path(folder))
        return model, processor
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a saved model; give the folder that"
            f" training or save_pretrained wrote, for example {folder}/final"
        )
    if base is not None or processor is not None:
        raise UserError(
            f"{folder} is a whole model, which brings its own base and processor; leave base and"
            " processor out"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, SparseCutConfig | SparseCutUpgradeConfig):
            raise UserError(
                f"{folder} holds a model of type {config.model_type}, which is not SparseCut's;"
                " give a vision-language model to sparsecut.upgrade, or an encoder and a language"
                " model to sparsecut.build"
            )
        model = AutoModelForImageTextToText.from_pretrained(folder, **from_pretrained)
        load_adapters(model, Path(folder))
    except OSError as error:
        raise UserError(
            f"there is no saved model {folder}: it is no folder here, or not a whole one, and"
            f" Hugging Face says: {error}"
        ) from error
    return model.eval(), read_processor(folder)


def is_saved(name: str | Path) -> bool:
    """Whether a folder or hub name holds what this package saved, and not another model; ValueError
    where it holds none.
    """
    if (Path(name) / FACTS).is_file():
        return True
    try:
        return isinstance(
            AutoConfig.from_pretrained(name), SparseCutConfig | SparseCutUpgradeConfig
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no model {name} that can be read; Hugging Face says: {error}"
        ) from error


def save(model: PreTrainedModel, processor, folder: str | Path, *, code: bool = False) -> None:
    """Write model, processor and chat template into one folder that `load` and the Auto classes
    read.

    code: put the source files of ours that they need beside them, for machines without this package
    (`trust_remote_code=True` there); a processor that is the base's own needs none.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for part, file in (
        ((model, "config.json"), (processor, "processor_config.json")) if code else ()
    ):
        kind = type(part)
        homes = AUTO_MAPS.get(kind.__name__) or AUTO_MAPS.get(kind.__module__.rpartition(".")[2])
        if homes is not None and type(part).__module__.partition(".")[0] != "transformers":
            custom_object_save(part, folder)  # its module and all that this imports relatively
            path = Path(folder) / file
            path.write_text(
                json.dumps(json.loads(path.read_text()) | {"auto_map": homes}, indent=2) + "\n"
            )


def depths_of(vision: str | nn.Module, language: str | nn.Module, **hub) -> tuple[int, int]:
    """Numbers of encoder and decoder layers, read from configurations alone."""
    configs = [
        _config_of(resolve(source, part), part, hub)
        for source, part in ((vision, "vision"), (language, "language"))
    ]
    vision_config = getattr(configs[0], "vision_config", configs[0])
    return vision_config.num_hidden_layers, configs[1].get_text_config().num_hidden_layers


def resolve(source, part: str):
    """A source as given, or for "shapes" the shipped folder of the picture world's backbone (part:
    vision or language).

    Raises ValueError for a path that is no folder: a hub name has one slash at most.
    """
    if (
        isinstance(source, str)
        and (source.count("/") > 1 or source.startswith((".", "/")))
        and not Path(source).is_dir()
    ):
        raise UserError(
            f"the {part} model {source!r} is a path, but there is no such folder; correct it, or"
            " make it first (a recipe that needs one made says in its first lines how)"
        )
    if source == OLD_SHAPES:
        logger.warning("the %s model %r is now called %r", part, OLD_SHAPES, SHAPES)
    elif source != SHAPES:
        return source
    return str(SHAPES_WEIGHTS / part)


def _config_of(source, part: str, hub: dict):
    if isinstance(source, nn.Module):
        return source.config
    try:
        return AutoConfig.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the {part} model {source!r} could not be read; give a folder, a hub name, or 'shapes'."
            f" Hugging Face says: {error}"
        ) from error


def _encoder_in(model: nn.Module, config) -> nn.Module:
    """The encoder of a model of several parts: the outermost module that has this configuration."""
    for module in model.modules():
        if getattr(module, "config", None) is config:
            return module
    raise UserError(
        f"no part of {type(model).__name__} has its vision_config, so its encoder cannot be told;"
        " hand over the encoder itself"
    )


def _load_encoder(name: str, config, dtype, settings: dict) -> nn.Module:
    """The encoder of a checkpoint; ValueError where it lacks weights, which would be random."""
    vision, info = AutoModel.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True, **settings
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{name} holds no weights for {len(missing)} parts of the encoder {config.model_type},"
            f" such as {missing[0]}; load the whole model, and hand over its encoder as a module,"
            " with its image_processor"
        )
    return vision


def _for_name(auto_class, source, argument: str, hub: dict):
    if not isinstance(source, str):
        raise UserError(
            f"a loaded module was given without its {argument}; hand over {argument}=..., as the"
            " module alone does not say how its input is prepared"
        )
    try:
        return auto_class.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} has no {argument} that can be read; give the folder or hub name of a"
            f" complete model. Hugging Face says: {error}"
        ) from error


def _as_dict(plan):
    return plan.to_dict() if isinstance(plan, Plan) else plan
