"""The tokenizer for drawn shapes: one token per word, and a chat template.

The template marks the assistant's text, so that labels can be made from it. Turns follow one
another without role names. An answer comes right after the last word of its question, which is its
subject, and ends with the end token. With role names in between, so small a model learned slowly.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .questions import list_words
from .sizes import SMALL, Size

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}{%- endfor -%}"
)


def make_tokenizer(extra: list[str] | None = None, size: Size = SMALL) -> PreTrainedTokenizerFast:
    """Make the tokenizer: lower case, split at whitespace.

    Args:
        extra: Further words, after those of the drawn shapes.
        size: The size whose cells are named.
    """
    words = [*SPECIAL.values(), *list_words(size), *(extra or [])]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
