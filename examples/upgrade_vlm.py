"""Upgrade a vision-language model by a recipe, train it, and see in numbers what its shortcuts do;
some minutes on a CPU.

    D=$SPARSECUT_DATA/emoji-vqa python examples/upgrade_vlm.py llava runs/upgraded $D/train.json
    $D/train_images.tar.gz      (or qwen in place of llava) sparsecut explain
    runs/upgraded/upgraded/final --data ... --images ...                       (each shortcut, with
    intervals)

Nothing is downloaded: the model is a tiny random LLaVA or Qwen2.5-VL with its own processor and prompt format, made on the
spot and saved to OUT/base. A recipe names that folder as its base and trains everything, shortcuts included. The same base is trained
without shortcuts for as many steps, and with two controls: the same taps all at the input, and finer views alone. Records that were held
out are then asked of all, and with shortcuts switched off.

It shows how a recipe with `base:` is used, and how much of what was learned goes through which shortcut. It does not show what a large
finished model gains, which starts from an encoder and a language model that know a lot: both here start from nothing.
A sixth argument is the seed.
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
QWEN_TEMPLATE = (  # as of Qwen/Qwen2.5-VL, without tools, videos and numbered pictures
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['content'] is string"
    " %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'image'"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor"
    " %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_for(texts, size: int, *special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer learned from texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    if "<|im_end|>" in special:
        names = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    learn = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(texts, learn)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def llava(texts, *, width: int = 96, view: int = 48, vocabulary: int = 1500):
    """(model, processor): a LLaVA of one view per picture, patches of 8 x 8 pixels, random
    weights.
    """
    tokenizer = tokenizer_for(texts, vocabulary, "<image>")
    sizes = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    ids = {
        name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")
    }
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "image_size": view,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            **sizes,
            **ids,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
        },
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
    """Qwen2.5-VL's processor without its videos, which need torchvision even where there are
    none.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
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


def qwen(texts, *, width: int = 96, view: int = 64, vocabulary: int = 1500):
    """(model, processor): a Qwen2.5-VL, 2 x 2 patches of 8 x 8 pixels under a token, pictures of
    about view x view pixels, random.
    """
    tokens = (
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokenizer = tokenizer_for(texts, vocabulary, *tokens)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(tokens[2:]))
    text = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    rope = {
        "rope_type": "default",
        "mrope_section": [width // 4 // 8, width // 4 // 8, width // 4 // 4],
        "rope_theta": 1e4,
    }
    vision = {
        "depth": 4,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_heads": 4,
        "out_hidden_size": width,
    }
    config = Qwen2_5_VLConfig(
        vision_config={
            **vision,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1, 3],
        },
        text_config={
            **text,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "rope_parameters": rope,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "max_position_embeddings": 512,
        },
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


# Which questions; and for every person or hand one skin tone, as in configs/emoji.yaml, is held out
# to be asked.
KINDS = r"^train\.(skin_tone|skin_tone_pair|gender|facing_right|hair)\."
TONES = r"\.[0-9a-f]*([0-2]-1f3fb|[3-5]-1f3fc|[6-8]-1f3fd|[9ab]-1f3fe|[c-f]-1f3ff)"
GROUP = r"^train\.(\w+)\."


def settings(steps: int, rate: float) -> dict:
    """TrainingArguments that all trainings here have."""
    schedule = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "weight_decay": 0.05,
        "logging_steps": 50,
    }
    return {
        "max_steps": steps,
        "learning_rate": rate,
        "per_device_train_batch_size": 32,
        **schedule,
    }


def train_plainly(model, processor, examples, steps: int, seed: int = 0) -> None:
    """Train all of a model's weights with transformers' own Trainer."""
    args = TrainingArguments(
        output_dir="unused",
        seed=seed,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings(steps, 1e-3),
    )
    encoder = example_encoder(processor)
    data = {
        "train_dataset": TrainingData(examples, encoder),
        "data_collator": Collator(encoder),
    }
    Trainer(model.train(), args, **data).train()
    model.eval()


SHORTCUTS = {"method": "sparsecut", "count": 3}


def main(kind: str, out: str, records: str, images: str, steps: int = 600, seed: int = 0) -> None:
    """Make a model, upgrade and train it by a recipe, ask it with and without its shortcuts, and
    print a table.
    """
    source = {"path": records, "images": images}
    lessons = read_source(Source(**source, where=KINDS, hold_out=TONES), [])
    asked = [
        e
        for e in read_source(Source(**source, where=KINDS, group=GROUP), [])
        if re.search(TONES, e.id)
    ]
    print(f"{len(lessons)} records to learn, {len(asked)} to ask")

    torch.manual_seed(seed)
    texts = [
        message["content"].replace("<image>", "")
        for example in lessons
        for message in example.messages
    ]
    base, processor = {"llava": llava, "qwen": qwen}[kind](texts)
    base.save_pretrained(f"{out}/base")
    processor.save_pretrained(f"{out}/base")
    train_plainly(base, processor, lessons, steps, seed)  # from the same start, in as many steps
    rows = {"without shortcuts": ask(*sparsecut.upgrade(base, processor=processor), asked)}

    for name, spec in controls(kind).items():
        rows[name] = ask(*upgraded(out, name.replace(" ", "-"), spec, source, steps, seed), asked)
    model, processor = upgraded(out, "upgraded", SHORTCUTS, source, steps, seed)
    rows["upgraded"] = ask(model, processor, asked)
    with model.fusion.switched_off(*model.fusion.gated):
        rows["its shortcuts switched off"] = ask(model, processor, asked)
    for number in model.fusion.gated:
        with model.fusion.switched_off(number):
            rows[f"its shortcut {number} switched off"] = ask(model, processor, asked)
    show(rows)


def controls(kind: str) -> dict[str, dict]:
    """Plans that say what a gain is not owed to: the same taps all at the input and, where there
    are any, finer views alone.
    """
    found = {"same taps at the input": {**SHORTCUTS, "method": "sparsecut_input"}}
    if kind == "llava":
        taps = {"taps": [-2], "layer": 0}
        finer = {
            "tiles": 2,
            "gate": "zero_projector",
            "shortcuts": [taps, {**taps, "mix": "channels"}],
        }
        found["finer views at the input"] = finer
    return found


def upgraded(out: str, folder: str, fusion: dict, source: dict, steps: int, seed: int):
    """The model of OUT/base, upgraded and trained whole by a recipe."""
    stage = {
        "name": "all",
        "data": {**source, "where": KINDS, "hold_out": TONES},
        "train": ["vision", "projector", "fusion", "language"],
        "args": settings(steps, 1e-3),
    }
    plain = {
        "model": {"base": f"{out}/base"},
        "fusion": fusion,
        "stages": [stage],
        "output": f"{out}/{folder}",
    }
    return sparsecut.train(parse_recipe({**plain, "seed": seed}))


def ask(model, processor, asked) -> dict:
    """Share of right answers, overall and by kind of question."""
    found = evaluate(model, processor, asked, max_new_tokens=12, batch_size=64)
    return {
        "all": found["accuracy"],
        **{name: group["accuracy"] for name, group in found["groups"].items()},
    }


def show(rows: dict[str, dict]) -> None:
    """Print the table."""
    columns = list(next(iter(rows.values())))
    print(f"{'right, in %':28}" + "".join(f"{name:>16}" for name in columns))
    for name, row in rows.items():
        print(f"{name:28}" + "".join(f"{100 * row[column]:16.1f}" for column in columns))


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:]))
