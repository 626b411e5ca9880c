"""Reading models and weights from files; what cannot be read is the user's to mend.

Images are opened by `pixels`, whose names are also here.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .hub import check_model_place
from .pixels import ImageSource as ImageSource
from .pixels import open_image as open_image
from .pixels import open_upright as open_upright
from .schema import UserError
from .timm_encoders import check_has_timm

PACKAGE = str(Path(__file__).parent)
FILE_ERRORS = (OSError, SafetensorError, StrictDataclassError)  # whoever reads the file
# Arguments that say how to reach the hub. They go to configurations, tokenizers and image
# processors too.
HUB_ARGUMENTS = (
    "token",
    "cache_dir",
    "local_files_only",
    "force_download",
    "revision",
    "subfolder",
    "trust_remote_code",
)
FLASH_PACKAGES = ("flash_attn", "flash_attn_3", "flash_attn_interface")

# How transformers says that a package is missing.
MISSING_PACKAGE = re.compile(
    r"requires the (\w+) library|have `(\w+)` installed|Package `(\w+)` is required"
    r"|No module named \'(\w+)",
    re.IGNORECASE,
)
PIP_NAMES = {"pil": "pillow", "sklearn": "scikit-learn", "cv2": "opencv-python"}


def load_pretrained(kind: Any, name: Any, complaint: str, **settings: Any) -> Any:
    """Call `kind.from_pretrained`.

    A damaged file makes transformers and tokenizers raise almost any error. Each means that the
    folder cannot be read, unless it arose in our own code. No code is run that the folder names or
    brings, unless `trust_remote_code` is set.

    Args:
        kind: A class with `from_pretrained`, such as AutoConfig.
        name: A folder or hub name.
        complaint: What cannot be read and what to give instead; the reason is put behind it.
        **settings: Further arguments of `from_pretrained`.

    Raises:
        UserError: There is no such folder or hub name, or it is damaged, or it asks for code.
    """
    hub = {key: settings[key] for key in HUB_ARGUMENTS if key in settings}
    try:
        settings = settings | check_model_place(name, **hub)
    except UserError as error:
        raise UserError(f"{complaint}: {error}") from None
    if kind.__name__.startswith("Auto"):
        settings = {"trust_remote_code": False, **settings}
    try:
        if kind.__name__.startswith(("AutoConfig", "AutoModel")):
            _check_configuration_file(name, settings)
        return kind.from_pretrained(name, **settings)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        is_about_files = isinstance(error, FILE_ERRORS)
        if _arose_in_our_code(error) and not is_about_files:
            raise
        package = find_missing_package(error)
        if package is not None:
            raise UserError(
                f"{name} needs the package {package}, which is not installed here; install it:"
                f" pip install {package}"
            ) from error
        reason = str(error) if is_about_files else f"{type(error).__name__}: {error}"
        raise UserError(f"{complaint}. Hugging Face says: {reason}") from error


def find_missing_package(error: Exception) -> str | None:
    """The package that an error of transformers misses, as pip knows it; None for other errors."""
    for found in MISSING_PACKAGE.finditer(str(error)):
        named = next(filter(None, found.groups()))
        package = named.lower()
        try:
            is_here = any(find_spec(name) for name in (named, package))
        except (ImportError, ValueError):
            continue
        if not is_here:
            return PIP_NAMES.get(package, package)
    return None


def _arose_in_our_code(error: Exception) -> bool:
    """Whether a line of this package raised it, and not what that line called."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.startswith(PACKAGE)


def load_weights(
    kind: Any, name: Any, complaint: str, *, optional: str = r"(?!)", **settings: Any
) -> nn.Module:
    """Call `kind.from_pretrained` for a model that others have saved.

    Args:
        kind: The model's class, or an Auto class.
        name: A folder or hub name; its file may hold other parts than this model too.
        complaint: As in `load_pretrained`.
        optional: A pattern of weights that may be missing, because nothing reads them.
        **settings: Further arguments of `from_pretrained`.

    Raises:
        UserError: The model cannot be read, or some of its weights would be random.
    """
    model, info = load_pretrained(kind, name, complaint, output_loading_info=True, **settings)
    check_loaded_weights(model, info, str(name), is_part=True, optional=optional)
    return model


def _check_configuration_file(name: Any, settings: dict) -> None:
    """`check_runs_no_code` for the config.json of a folder or hub name, before it is used."""
    if settings.get("trust_remote_code") or settings.get("gguf_file"):
        return
    hub = {key: settings[key] for key in HUB_ARGUMENTS if key in settings}
    values, _ = PreTrainedConfig.get_config_dict(name, **hub | {"force_download": False})
    check_runs_no_code(values, str(name))
    if isinstance(values, dict):  # else reading it says what is wrong
        check_has_timm(values, str(name))


def check_runs_no_code(values: dict, source: str) -> None:
    """Raise UserError where a configuration makes transformers fetch code from the hub and run it.

    Args:
        values: What a configuration file holds, with all that is nested in it.
        source: Where it comes from, for the error.
    """
    for key, name in _find_implementations(values):
        if _is_fetched(name):
            raise UserError(
                f"the configuration of {source} has {key}={name!r}, which makes transformers fetch"
                " and run code; take it out of the file, or give trust_remote_code=True if you"
                " trust that code"
            )


def _find_implementations(values: Any, inside: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (key, name) wherever a configuration names how attention or experts are computed."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in pairs:
        is_name = inside or "_implementation" in str(key)
        if isinstance(value, dict | list):
            yield from _find_implementations(value, is_name)
        elif is_name and isinstance(value, str):
            yield key, value


def _is_fetched(implementation: str) -> bool:
    """Whether transformers takes an implementation from the hub, for want of an own one."""
    name = implementation.rpartition("|")[2]
    if name.startswith("flash_attention_") and find_spec("kernels") is not None:
        return not any(find_spec(package) for package in FLASH_PACKAGES)
    return "/" in name


def check_loaded_weights(
    model: nn.Module, info: dict, source: str, *, is_part: bool = False, optional: str = r"(?!)"
) -> None:
    """Raise UserError where weights of a model would be random, or weights of its file be lost.

    Args:
        model: What `from_pretrained` has loaded.
        info: What it says about missing and unexpected weights.
        source: Where the weights come from, for the error.
        is_part: The file may hold other parts too. Then only weights of this model's own kinds of
            layers need a place in it, such as those of a layer beyond its depth.
        optional: A pattern of names that may be missing, because nothing reads them.
    """
    missing = [name for name in sorted(info["missing_keys"]) if not re.search(optional, name)]
    unknown = sorted(info["unexpected_keys"])
    if is_part:
        unknown = _find_surplus(model, unknown)
    if missing or unknown:
        raise UserError(
            f"the weights in {source} are not those of the {type(model).__name__} that its"
            f" configuration describes: {describe_names(missing)} are missing and would be random,"
            f" {describe_names(unknown)} have no place in it; give the folder or hub name of the"
            " whole model, or save or fetch it again"
        )


def _find_surplus(model: nn.Module, names: list[str]) -> list[str]:
    """The names that belong to layers as the model has them; numbers of layers do not count."""
    owners = {_without_numbers(name.rpartition(".")[0]) for name, _ in model.named_parameters()}
    return [name for name in names if _without_numbers(name.rpartition(".")[0]) in owners - {""}]


def _without_numbers(name: str) -> str:
    return re.sub(r"\b\d+\b", "*", name)


def describe_names(names: list[str]) -> str:
    """How many names there are, and the first three."""
    return f"{len(names)} ({', '.join(names[:3])})" if names else "none"


def check_finite(module: nn.Module, source: str) -> None:
    """Raise UserError where a parameter holds NaN or infinity, as after a diverged training."""
    for name, parameter in module.named_parameters():
        values = parameter.detach()
        # Quantized values are of classes of their own, offloaded ones are not here.
        is_plain = type(values) is Tensor and values.is_floating_point() and not values.is_meta
        # A sum is much quicker than a mask, and finite only if all values are.
        if not is_plain or values.sum(dtype=torch.float32).isfinite():
            continue
        if not values.isfinite().all():
            raise UserError(
                f"the weight {name} in {source} holds values that are not numbers (NaN or"
                " infinity), so every answer would be wrong; use an earlier checkpoint, or save or"
                " fetch the model again"
            )


def is_quantized(config: Any) -> bool:
    """Whether a configuration speaks of quantized weights."""
    return getattr(config, "quantization_config", None) is not None


def check_not_bare_vllm(config: Any) -> None:
    """Raise UserError where vLLM runs a model by its general backend.

    That backend knows nothing of shortcuts. It would take logits for hidden states, and crash.
    """
    text_config = getattr(config, "text_config", None)
    if getattr(text_config, "_attn_implementation", None) == "vllm":
        raise UserError(
            "vLLM needs the plug-in of this package for SparseCut models, but does not use it;"
            " run pip install 'sparsecut[vllm]' where vLLM runs, leave VLLM_PLUGINS unset or let"
            " it name sparsecut, and start vLLM again without --trust-remote-code"
        )


def holds_quantized_values(module: nn.Module) -> bool:
    """Whether any weight is of a class of its own, of small integers or of one byte."""
    for values in module.state_dict().values():
        is_own_class = type(values) not in (Tensor, nn.Parameter)
        is_narrow = values.dtype.itemsize == 1 and values.dtype != torch.bool
        if is_own_class or is_narrow or values.dtype in (torch.int16, torch.int32):
            return True
    return False


def forget_quantization(config: Any) -> None:
    """Take out of a configuration how weights were quantized in a file that is not there any more.

    So it is with language models that were read from a GGUF file.
    """
    for one in (config, config.get_text_config()):
        if is_quantized(one):
            del one.quantization_config


def adopt_quantization(model: nn.Module, part: nn.Module) -> None:
    """Let a model save and load the quantized weights of a part that was loaded before it."""
    if getattr(part, "hf_quantizer", None) is not None and holds_quantized_values(part):
        model.hf_quantizer = part.hf_quantizer
        model.config.quantization_config = part.hf_quantizer.quantization_config


def find_compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in, quantized or not: that of its embeddings or norms."""
    for module in (model.get_input_embeddings(), model):
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
                return parameter.dtype
    return torch.float32


def read_tensors(file: Path, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; UserError where it is missing or damaged."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the weights {file} cannot be read ({error}); {remedy}") from error
