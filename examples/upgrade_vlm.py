"""Upgrade a pretrained VLM by a recipe, train it, and measure what its shortcuts do.

    D=$SPARSECUT_DATA/emoji-vqa
    python examples/upgrade_vlm.py llava runs/upgraded $D/train.json $D/train_images.tar.gz
    sparsecut explain runs/upgraded/upgraded/final --data ... --images ...

It takes some minutes on a CPU. The arguments are the kind of base (llava or qwen), an output
folder, records, their images, and optionally the number of steps and the seed.

Nothing is downloaded. The base is a tiny random LLaVA or Qwen2.5-VL with its own processor and
prompt format, saved to OUT/base. A recipe names that folder as its base and trains everything,
shortcuts included. For comparison the same base is trained for as many steps without shortcuts, and
with controls: the same taps all at the input, and fine views alone. All are then evaluated on
records that were held out, the upgraded model also with its shortcuts switched off.

The example shows how a recipe with `base:` is used, and how much of the answers depends on which
shortcut. It does not show what a large pretrained VLM gains, because this base has learned nothing.
"""

import re
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

import sparsecut
from sparsecut.config.recipe import Source, parse_recipe
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_source
from sparsecut.evaluation.evaluator import evaluate

LLAVA_TEMPLATE = (  # as of llava-hf/llava-1.5-7b-hf
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] if c['type'] =="
    " 'image' %}{{ '<image>\n' }}{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{%"
    " if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}{% else"
    " %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{"
    " 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (  # as of Qwen/Qwen2.5-VL, without tools, videos and numbered images
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string"
    " %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image'"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor"
    " %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts, size: int, *special: str) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if "<|im_end|>" in special:
        names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def build_llava(texts, *, width: int = 96, view: int = 48, vocabulary: int = 1500):
    """Build a random LLaVA of one view per image, with patches of 8 x 8 pixels.

    Args:
        texts: what the tokenizer is trained on.
        width: hidden size of the encoder and of the language model.
        view: side of a view in pixels.
        vocabulary: size of the vocabulary without special tokens.

    Returns:
        (model, processor).
    """
    tokenizer = train_tokenizer(texts, vocabulary, "<image>")
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    vision_config = {
        "model_type": "clip_vision_model",
        **sizes,
        "image_size": view,
        "patch_size": 8,
    }
    text_config = {
        "model_type": "llama",
        **sizes,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
    }
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(view // 8) ** 2,
    )
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": view}, crop_size={"height": view, "width": view}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


class Qwen2_5_VLPictureProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without videos, which need torchvision even where there are none."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        """Names of what it returns."""
        return [
            *self.tokenizer.model_input_names,
            *self.image_processor.model_input_names,
            "mm_token_type_ids",
        ]


AutoProcessor.register(Qwen2_5_VLConfig, Qwen2_5_VLPictureProcessor, exist_ok=True)


def build_qwen(texts, *, width: int = 96, view: int = 64, vocabulary: int = 1500):
    """Build a random Qwen2.5-VL with 2 x 2 patches of 8 x 8 pixels under an image token.

    Args:
        texts: what the tokenizer is trained on.
        width: hidden size of the encoder and of the language model.
        view: images are resized to about view x view pixels.
        vocabulary: size of the vocabulary without special tokens.

    Returns:
        (model, processor).
    """
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    special += ("<|image_pad|>", "<|video_pad|>")
    tokenizer = train_tokenizer(texts, vocabulary, *special)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(special[2:]))
    config = Qwen2_5_VLConfig(
        vision_config=make_qwen_vision_config(width),
        text_config=make_qwen_text_config(width, tokenizer),
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, size={"shortest_edge": view**2 // 2, "longest_edge": view**2}
    )
    processor = Qwen2_5_VLPictureProcessor(image_processor, tokenizer, chat_template=QWEN_TEMPLATE)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), processor


def make_qwen_vision_config(width: int) -> dict:
    """Settings of the encoder: four blocks, two of them with attention over the whole image."""
    return {
        "depth": 4,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_heads": 4,
        "out_hidden_size": width,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
    }


def make_qwen_text_config(width: int, tokenizer) -> dict:
    """Settings of the language model: four layers."""
    head_dim = width // 4
    sections = [head_dim // 8, head_dim // 8, head_dim // 4]  # time, height, width
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4},
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 512,
    }


BASES = {"llava": build_llava, "qwen": build_qwen}

# The questions. For every person or hand one skin tone is held out, as in the recipe emoji.
KINDS = r"^train\.(skin_tone|skin_tone_pair|gender|facing_right|hair)\."
TONES = r"\.[0-9a-f]*([0-2]-1f3fb|[3-5]-1f3fc|[6-8]-1f3fd|[9ab]-1f3fe|[c-f]-1f3ff)"
GROUP = r"^train\.(\w+)\."

SHORTCUTS = {"method": "sparsecut", "count": 3}


def make_arguments(steps: int) -> dict:
    """TrainingArguments of all trainings here."""
    return {
        "max_steps": steps,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "weight_decay": 0.05,
        "logging_steps": 50,
    }


def train_base(model, processor, examples, steps: int, seed: int = 0) -> None:
    """Train all of a base's weights with transformers' own Trainer."""
    arguments = TrainingArguments(
        output_dir="unused",
        seed=seed,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **make_arguments(steps),
    )
    encoder = example_encoder(processor)
    trainer = Trainer(
        model.train(),
        arguments,
        train_dataset=TrainingData(examples, encoder),
        data_collator=Collator(encoder),
    )
    trainer.train()
    model.eval()


def make_controls(kind: str) -> dict[str, dict]:
    """Plans that show what causes a gain.

    One has the same taps, all at the input. A base with one view per image has another one: fine
    views alone.
    """
    controls = {"same taps at the input": {**SHORTCUTS, "method": "sparsecut_input"}}
    if kind == "llava":
        coarse = {"taps": [-2], "layer": 0}
        fine = {"taps": [-2], "layer": 0, "mix": "channels"}
        controls["finer views at the input"] = {
            "tiles": 2,
            "gate": "zero_projector",
            "shortcuts": [coarse, fine],
        }
    return controls


def train_upgraded(out: str, folder: str, fusion: dict, source: dict, steps: int, seed: int):
    """Upgrade the base in OUT/base and train the whole model by a recipe.

    Returns:
        (model, processor).
    """
    stage = {
        "name": "all",
        "data": {**source, "where": KINDS, "hold_out": TONES},
        "train": ["vision", "projector", "fusion", "language"],
        "args": make_arguments(steps),
    }
    recipe = {
        "model": {"base": f"{out}/base"},
        "fusion": fusion,
        "stages": [stage],
        "output": f"{out}/{folder}",
        "seed": seed,
    }
    return sparsecut.train(parse_recipe(recipe))


def measure(model, processor, examples) -> dict[str, float]:
    """Accuracy over all examples, and by kind of question."""
    result = evaluate(model, processor, examples, max_new_tokens=12, batch_size=64)
    row = {"all": result["accuracy"]}
    for name, group in result["groups"].items():
        row[name] = group["accuracy"]
    return row


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """Print one line per model."""
    columns = list(next(iter(rows.values())))
    print(f"{'right, in %':28}" + "".join(f"{name:>16}" for name in columns))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{100 * row[column]:16.1f}" for column in columns))


def read_splits(records: str, images: str) -> tuple[list, list]:
    """Read the examples to train on, and those that are held out."""
    source = {"path": records, "images": images, "where": KINDS}
    train_examples = read_source(Source(**source, hold_out=TONES), [])
    every_example = read_source(Source(**source, group=GROUP), [])
    test_examples = [example for example in every_example if re.search(TONES, example.id)]
    print(f"{len(train_examples)} records to train on, {len(test_examples)} to evaluate on")
    return train_examples, test_examples


def collect_texts(examples) -> list[str]:
    """All messages of examples, without placeholders."""
    texts = []
    for example in examples:
        for message in example.messages:
            texts.append(message["content"].replace("<image>", ""))
    return texts


def main(kind: str, out: str, records: str, images: str, steps: int = 600, seed: int = 0) -> None:
    """Train a base with and without shortcuts, and print a table of accuracies."""
    source = {"path": records, "images": images}
    train_examples, test_examples = read_splits(records, images)

    torch.manual_seed(seed)
    base, processor = BASES[kind](collect_texts(train_examples))
    base.save_pretrained(f"{out}/base")
    processor.save_pretrained(f"{out}/base")
    train_base(base, processor, train_examples, steps, seed)
    without_shortcuts = sparsecut.upgrade(base, processor=processor)
    rows = {"without shortcuts": measure(*without_shortcuts, test_examples)}

    for name, plan in make_controls(kind).items():
        folder = name.replace(" ", "-")
        control = train_upgraded(out, folder, plan, source, steps, seed)
        rows[name] = measure(*control, test_examples)

    model, processor = train_upgraded(out, "upgraded", SHORTCUTS, source, steps, seed)
    rows["upgraded"] = measure(model, processor, test_examples)
    shortcuts = model.fusion.gated
    with model.fusion.switched_off(*shortcuts):
        rows["its shortcuts switched off"] = measure(model, processor, test_examples)
    for number in shortcuts:
        with model.fusion.switched_off(number):
            name = f"its shortcut {number} switched off"
            rows[name] = measure(model, processor, test_examples)
    print_table(rows)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:]))
