"""Make a small random encoder and language model whose vocabulary is learned from files of records.

    python examples/small_backbones.py OUT IMAGES RECORDS...

writes OUT/vision and OUT/language, for recipes that train everything from scratch on a CPU (configs/emoji.yaml, nlvr.yaml).
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers import PreTrainedTokenizerFast as Fast

from sparsecut.data.examples import read_examples

out, images, *files = sys.argv[1:]
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
texts = (
    m["content"].replace("<image>", "")
    for f in files
    for e in read_examples(f, images)
    for m in e.messages
)

core = Tokenizer(models.BPE())
core.pre_tokenizer, core.decoder = (
    pre_tokenizers.ByteLevel(add_prefix_space=False),
    decoders.ByteLevel(),
)
alphabet = pre_tokenizers.ByteLevel.alphabet()
core.train_from_iterator(
    texts,
    trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet
    ),
)
tokenizer = Fast(tokenizer_object=core, **SPECIAL)

torch.manual_seed(0)
shape = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
}
vision = CLIPVisionConfig(**shape, image_size=48, patch_size=8)
ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
language = LlamaConfig(**shape, **ids, vocab_size=len(tokenizer), max_position_embeddings=512)
CLIPVisionModel(vision).save_pretrained(Path(out) / "vision")
CLIPImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(
    Path(out) / "vision"
)
LlamaForCausalLM(language).save_pretrained(Path(out) / "language")
tokenizer.save_pretrained(Path(out) / "language")
