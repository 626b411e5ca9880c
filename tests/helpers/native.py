"""Processors of base models whose tokenizers have a token per byte, and conversations for them."""

import numpy as np
import torch
from helpers import bases
from helpers.tiny import SPECIAL
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Processor,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from sparsecut.data.examples import IMAGE, Example

# Templates as the families have them: with and without generation marks, with images in their
# places or first.
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] if c['type'] =="
    " 'image' %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{%"
    " if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% else"
    " %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{"
    " 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else"
    " m['role']) + '\n' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in"
    " m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] |"
    " trim }}{% endif %}{% endfor %}{% endif %}{{ '</s>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
IDEFICS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}{{ ':' if"
    " m['content'][0]['type'] == 'image' else ': ' }}{% for c in m['content'] %}{{ c['text'] if"
    " c['type'] == 'text' else '<image>' }}{% endfor %}{{ '</s>\n' }}{% endfor %}{% if"
    " add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def byte_tokenizer(*tokens: str, **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that every character shows whether it is learned."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(characters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL, **named)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )
    return tokenizer


def llava():
    """LLaVA-1.5's, with generation marks."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    settings = {
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA,
    }
    return LlavaProcessor(images, byte_tokenizer("<image>"), patch_size=8, **settings)


def llava_next():
    """LLaVA-NeXT's, with crops."""
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    images = LlavaNextImageProcessorPil(
        **sizes, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]]
    )
    settings = {
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": LLAVA,
    }
    return LlavaNextProcessor(images, byte_tokenizer("<image>"), patch_size=8, **settings)


def gemma3():
    """Gemma 3's."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    return Gemma3Processor(
        images,
        byte_tokenizer("<turn>", extra_special_tokens=names),
        chat_template=GEMMA,
        image_seq_length=4,
    )


def idefics3():
    """Idefics3's, with crops."""
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return Idefics3Processor(images, byte_tokenizer(), image_seq_len=4, chat_template=IDEFICS)


def paligemma():
    """PaliGemma's, with prefix and suffix."""
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, byte_tokenizer())


PROCESSORS = {
    "llava": llava,
    "llava_next": llava_next,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "paligemma": paligemma,
}


def make_image(width: int, height: int) -> Image.Image:
    """An image of noise."""
    generator = np.random.default_rng(width * height)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(*turns: str, sizes=()) -> tuple[Example, list[Image.Image]]:
    """A conversation, and images of some sizes for it."""
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    example = Example("x", ["x.png"] * len(sizes), messages, source="talk.json record 0")
    return example, [make_image(*size) for size in sizes]


# Conversations with their images. The last two can be had without a chat template: one question
# with images, one answer.
TALKS = [
    talk("what is blue ?", "it is a dog", "sure ?", "a"),
    talk(f"{IMAGE}\nwhat is it", "a red cat", "are you sure ?", "yes", sizes=[(40, 20)]),
    talk(f"is {IMAGE} it\n{IMAGE} or", " no, it\nis not ", sizes=[(16, 30), (64, 48)]),
    talk(f"{IMAGE}\nwhat is it", "two\n\nparagraphs", sizes=[(30, 30)]),
]


def get_talks(processor) -> list:
    """The conversations that a processor can take."""
    return TALKS if processor.chat_template else TALKS[2:]


def build_base(name: str, processor):
    """A tiny random model of a family whose vocabulary and images are the processor's."""
    config = bases.base_config(name)
    tokenizer = processor.tokenizer
    config.image_token_id = tokenizer.convert_tokens_to_ids(
        "<image_soft_token>" if name == "gemma3" else "<image>"
    )
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, token, getattr(tokenizer, token))
    if name.startswith("llava"):
        config.vision_config.patch_size = 8
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().float()
    if name == "gemma3":  # starts at zero, which would hide every image
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model
