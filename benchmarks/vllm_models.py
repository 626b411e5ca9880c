"""What benchmarks/vllm.py serves: a stock LLaVA and models of this package, of one size.

All of them share encoder, language model and tokenizer, with random weights. Their last token, the
end of an answer, is never the likeliest one, so every server writes all the tokens that it may.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sparsecut import build
from sparsecut.methods import METHODS
from sparsecut.profiling.counting import PlanCost, count_plan
from sparsecut.profiling.sizes import REFERENCE

STOCK = "stock"  # transformers' LLaVA, which vLLM serves by its own code
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
TEMPLATE = """\
{%- for message in messages -%}
USER: {% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}{{ '<image>' + ('' if loop.last else '\\n') }}
{%- else %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif -%}"""


@dataclass(frozen=True)
class Size:
    """How large the models are.

    Attributes:
        vision: The encoder's configuration.
        language: The language model's configuration.
        dtype: Of all weights.
        max_length: Positions that the servers reserve for a request.
        num_text_tokens: Words of a question.
    """

    vision: CLIPVisionConfig
    language: LlamaConfig
    dtype: str
    max_length: int
    num_text_tokens: int

    def describe(self) -> str:
        """The size in words."""
        vision, language = self.vision, self.language
        num_tokens = (vision.image_size // vision.patch_size) ** 2
        return (
            f"encoder {vision.num_hidden_layers} x {vision.hidden_size},"
            f" {vision.image_size} pixels, {num_tokens} image tokens; language model"
            f" {language.num_hidden_layers} x {language.hidden_size}, vocabulary"
            f" {language.vocab_size:,}; {self.dtype}"
        )


def make_size(name: str) -> Size:
    """A size by name: "small" and "tiny" for CPUs, "7b" for GPUs."""
    if name == "7b":
        vision, language = (
            REFERENCE["vision"]["clip-l-336"],
            REFERENCE["language"]["llama-7b"],
        )
        return Size(vision, language, "bfloat16", 1024, 48)
    # The proportions of CLIP-L beside a 7B: a quarter of the width, three quarters of the depth.
    width, depth, vocab_size = {"small": (512, 8, 8192), "tiny": (128, 4, 512)}[name]
    vision = CLIPVisionConfig(
        hidden_size=width // 4,
        intermediate_size=width,
        num_hidden_layers=6,
        num_attention_heads=max(1, width // 256),
        image_size=168 if name == "small" else 56,
        patch_size=14,
    )
    language = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=depth,
        num_attention_heads=max(2, width // 64),
        max_position_embeddings=512,
    )
    return Size(vision, language, "float32", 512, 48)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one word for every id, and with LLaVA's placeholder."""
    words = [*SPECIAL, "USER:", "ASSISTANT:"]
    words += [f"w{number}" for number in range(vocab_size - len(words))]
    ids = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )


def make_models(folder: Path, size_name: str, plans: list[str], device: str) -> None:
    """Write a stock LLaVA and one model for each plan, each into a folder of its name."""
    size = make_size(size_name)
    torch.manual_seed(0)
    tokenizer = make_tokenizer(size.language.vocab_size)
    size.language.update(
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False}
    )
    torch.set_default_dtype(getattr(torch, size.dtype))
    with torch.device(device):
        vision = CLIPVisionModel(size.vision)
        language = LlamaForCausalLM(size.language)
        # Scores are never all negative, so a token whose score is 0 is never the likeliest.
        torch.nn.init.zeros_(language.lm_head.weight.data[: len(SPECIAL)])
        side = size.vision.image_size
        images = CLIPImageProcessorPil(
            size={"height": side, "width": side}, crop_size={"height": side, "width": side}
        )
        save_stock(folder / STOCK, size, vision, language, images, tokenizer)
        for plan in plans:
            model, processor = build(
                vision,
                language,
                plan,
                image_processor=images,
                tokenizer=tokenizer,
                dtype=getattr(torch, size.dtype),
            )
            model.save_pretrained(folder / plan)
            processor.save_pretrained(folder / plan)


def save_stock(folder: Path, size: Size, vision, language, image_processor, tokenizer) -> None:
    """Write transformers' LLaVA around an encoder and a language model."""
    config = LlavaConfig(
        vision_config=size.vision,
        text_config=size.language,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(size.vision.image_size // size.vision.patch_size) ** 2,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    vision_width, width = size.vision.hidden_size, size.language.hidden_size
    projector = nn.Module()
    projector.linear_1 = nn.Linear(vision_width, width)
    projector.linear_2 = nn.Linear(width, width)
    # The names of weights on the hub, which vLLM knows; transformers now writes shorter ones.
    parts = {
        "language_model.": language,
        "vision_tower.vision_model.": vision,
        "multi_modal_projector.": projector,
    }
    weights = {}
    for prefix, part in parts.items():
        for name, weight in part.state_dict().items():
            weights[prefix + name.removeprefix("vision_model.")] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=size.vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def make_models_apart(folder: Path, size_name: str, plans: list[str], device: str) -> None:
    """`make_models` in a process of its own, so that it leaves no memory taken."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, __file__, str(folder), size_name, device, *plans]
    subprocess.run(command, check=True)


def count_costs(size: Size, plans: list[str], new_tokens: int) -> dict[str, dict[str, float]]:
    """FLOPs of a request by plan: of all of it, and without encoder and fusion.

    A stock LLaVA counts as the plan `llava`.
    """
    costs = {}
    for plan in dict.fromkeys(["llava", *plans]):
        cost = count_plan(size.vision, size.language, plan, num_text_tokens=size.num_text_tokens)
        language = cost.language_prefill_flops + new_tokens * cost.language_per_new_token_flops
        costs[plan] = {"language": language, "request": language + count_vision(cost)}
    return costs


def count_vision(cost: PlanCost) -> int:
    """FLOPs of encoder and fusion."""
    return cost.encoder_coarse_flops + cost.encoder_fine_flops + cost.fusion_flops


def check_plans(plans: list[str]) -> None:
    """End with a sentence where a plan is unknown."""
    unknown = [plan for plan in plans if plan not in METHODS]
    if unknown:
        sys.exit(f"no plan is named {', '.join(unknown)}; there are {', '.join(METHODS)}")


if __name__ == "__main__":
    out, name, place, *names = sys.argv[1:]
    make_models(Path(out), name, names, place)
