"""Whisper from CTranslate2's file: a tiny one goes through its names and comes back equal."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from sparsecut.schema import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real"))

import convert_whisper


@pytest.fixture(scope="module")
def whisper():
    """A tiny random Whisper."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=12,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=9,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("encoder.embed_positions.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_ctranslate_tensors(model) -> dict:
    """Tensors as CTranslate2's converter of Whisper names and joins them."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tensors = {"encoder/num_heads": np.array(1, np.int16)}
    for old, new in convert_whisper.OUTER_NAMES.items():
        for kind, last in KINDS_OF[old.rpartition("/")[2]].items():
            tensors[f"{old}/{kind}" if kind else old] = state[f"{new}.{last}" if last else new]
    for side, number in [(side, n) for side in ("encoder", "decoder") for n in range(2)]:
        for old, new in convert_whisper.LAYER_NAMES.items():
            if side == "encoder" and old.startswith("attention/"):
                continue
            names = [f"model.{side}.layers.{number}.{name}" for name in new.split()]
            kinds = {"gamma": "weight", "beta": "bias"} if "norm" in old else PLAIN
            for kind, last in kinds.items():
                parts = [get_or_zero(state, f"{name}.{last}") for name in names]
                tensors[f"{side}/layer_{number}/{old}/{kind}"] = np.concatenate(parts)
    return tensors


PLAIN = {"weight": "weight", "bias": "bias"}
KINDS_OF = {
    "conv1": PLAIN,
    "conv2": PLAIN,
    "layer_norm": {"gamma": "weight", "beta": "bias"},
    "encodings": {"": ""},
    "weight": {"": ""},
}


def get_or_zero(state: dict, name: str) -> np.ndarray:
    """A weight; keys of Whisper have no bias."""
    if name.endswith("k_proj.bias"):
        return np.zeros(32, np.float32)
    return state[name]


def write_ctranslate(path: Path, tensors: dict) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    codes = {np.dtype(dtype): code for code, dtype in convert_whisper.DTYPES.items()}
    for name, value in tensors.items():
        content += text(name) + struct.pack("<B", value.ndim)
        content += struct.pack(f"<{value.ndim}I", *value.shape)
        content += struct.pack("<BI", codes[value.dtype], value.nbytes) + value.tobytes()
    path.write_bytes(content + struct.pack("<I", 0))


class Words:
    """The two tokens that a Whisper's configuration names."""

    def convert_tokens_to_ids(self, tokens):
        return [0, 1]


def test_whisper_comes_back_from_its_file(whisper, tmp_path):
    write_ctranslate(tmp_path / "model.bin", make_ctranslate_tensors(whisper))
    tensors = convert_whisper.read_ctranslate(tmp_path / "model.bin")
    again = convert_whisper.build_whisper(convert_whisper.rename_weights(tensors), Words())
    features = torch.randn(1, 8, 20, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 3]])
    again.config._attn_implementation = whisper.config._attn_implementation
    with torch.no_grad():
        expected = whisper(features, decoder_input_ids=ids).logits
        assert torch.equal(again(features, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("damage", ["cut", "other kind", "a layer lacks", "a bias of keys"])
def test_a_file_that_is_no_whole_whisper_is_refused(whisper, tmp_path, damage):
    tensors = make_ctranslate_tensors(whisper)
    if damage == "a layer lacks":
        tensors = {name: x for name, x in tensors.items() if "encoder/layer_1/ffn" not in name}
    if damage == "a bias of keys":
        name = "decoder/layer_0/self_attention/linear_0/bias"
        tensors[name] = np.ones_like(tensors[name])
    path = tmp_path / "model.bin"
    write_ctranslate(path, tensors)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "other kind":
        path.write_bytes(path.read_bytes().replace(b"WhisperSpec", b"MarianSpecs"))
    with pytest.raises(UserError):
        tensors = convert_whisper.read_ctranslate(path)
        convert_whisper.build_whisper(convert_whisper.rename_weights(tensors), Words())
