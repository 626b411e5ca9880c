"""Make a small random encoder and language model whose vocabulary is learned from records.

    python examples/small_backbones.py OUT IMAGES RECORDS... [--layers 6] [--heads 3]

It writes OUT/vision and OUT/language, for recipes that train everything from scratch on a CPU, such
as the recipes emoji and nlvr. vLLM on CPUs serves heads of 32 values, so `--heads 3`, but not four
of 24.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparsecut.data.examples import read_examples

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}


def read_texts(files: list[str], images: str) -> Iterator[str]:
    """Read all messages of some files, without placeholders."""
    for file in files:
        for example in read_examples(file, images):
            for message in example.messages:
                yield message["content"].replace("<image>", "")


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of 2,000 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


def save_vision(folder: Path) -> None:
    """Save a random CLIP encoder of views of 48 x 48 pixels in patches of 8 x 8."""
    config = CLIPVisionConfig(**SIZES, image_size=48, patch_size=8)
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(folder)


def save_language(folder: Path, tokenizer: PreTrainedTokenizerFast, **sizes: int) -> None:
    """Save a random Llama with a tokenizer."""
    config = LlamaConfig(
        **{**SIZES, **sizes},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write both backbones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("images")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--heads", type=int, default=SIZES["num_attention_heads"])
    options = parser.parse_args()
    tokenizer = train_tokenizer(read_texts(options.files, options.images))
    torch.manual_seed(0)
    save_vision(options.out / "vision")
    sizes = {"num_hidden_layers": options.layers, "num_attention_heads": options.heads}
    save_language(options.out / "language", tokenizer, **sizes)


if __name__ == "__main__":
    main()
