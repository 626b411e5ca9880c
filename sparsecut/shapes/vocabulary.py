"""The picture world's tokenizer: one token per word, and a chat template that marks the assistant's
words.

Turns follow one another without names of roles: an answer comes right after the last word of a question, which is what it
is about, and ends with the end token. Names of roles in between made so small a model slow to learn.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .questions import vocabulary
from .sizes import SMALL, Size

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{%- else -%}{{- message['content'] -}}{%- endif -%}{%- endfor -%}"
)


def make_tokenizer(extra: list[str] | None = None, size: Size = SMALL) -> PreTrainedTokenizerFast:
    """The tokenizer of the world's words, and of `extra` words after them; lower case, split at
    blanks.
    """
    words = [*SPECIAL.values(), *vocabulary(size), *(extra or [])]
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
