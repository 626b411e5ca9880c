"""Tiny random models and a word-level tokenizer, made on the spot: what the tests build everything
from.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sparsecut import build

WORDS = [
    "a",
    "b",
    "c",
    "d",
    "what",
    "is",
    "it",
    "cat",
    "dog",
    "red",
    "blue",
    "are",
    "you",
    "sure",
    "yes",
    "no",
    "USER",
    ":",
    "ASSISTANT",
    "one",
    "two",
    "three",
    ".",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER : ' + m['content'] + ' ' }}{% else"
    " %}{{ 'ASSISTANT : ' }}{% generation %}{{ m['content'] + ' </s> ' }}{% endgeneration %}{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of some thirty words, with a chat template that marks the assistant's
    words.
    """
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_vision(layers: int = 6):
    """A CLIP encoder: views of 16 x 16 pixels, 2 x 2 patches, width 16."""
    config = CLIPVisionConfig(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=24,
        num_hidden_layers=layers,
        image_size=16,
        patch_size=8,
    )
    return AutoModel.from_config(config).eval()


def tiny_language(layers: int = 4, tie: bool = False):
    """A Llama of width 24 with the tokenizer's vocabulary."""
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_hidden_layers=layers,
        vocab_size=len(tiny_tokenizer()),
        tie_word_embeddings=tie,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config).eval()


SPARSE = {
    "method": "sparsecut",
    "pattern": "sparse",
}  # two shortcuts above the input in models of these depths


def tiny_model(plan=SPARSE, *, vision=None, language=None, seed: int = 0, **settings):
    """(model, processor) of tiny random parts under a plan; equal seeds give equal weights.

    `settings` are further arguments of `build`.
    """
    torch.manual_seed(seed)
    vision, language = vision or tiny_vision(), language or tiny_language()
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    return build(vision, language, plan, **parts, **settings)


def tiny_llava():
    """(model, processor): a tiny LLaVA of views of 16 x 16 pixels, 2 x 2 patches."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, image_size=16, patch_size=8, **sizes
        ),
        text_config=LlamaConfig(
            hidden_size=32, intermediate_size=48, vocab_size=len(tokenizer), **sizes
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    tokenizer.padding_side = "left"
    return LlavaForConditionalGeneration(config).eval(), processor
