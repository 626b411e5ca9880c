"""From a recipe with a base to answers: what is trained, saved, loaded and asked is the base's own
way, with shortcuts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.example_bases import KINDS, build_example_base
from helpers.records import encode_batch
from helpers.runs import log, stage, write_records
from PIL import Image

from sparsecut import Chat, load, train, upgrade
from sparsecut.config.recipe import load_recipe, parse_recipe
from sparsecut.data.examples import IMAGE, Example, read_examples
from sparsecut.evaluation.ablation import explain
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.prompts import render_prompt, run_processor, split_at_images
from sparsecut.reports.ablation import write_text
from sparsecut.training.arguments import build_arguments
from sparsecut.training.trainer import StageTrainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=KINDS)
def base(request):
    return build_example_base(request.param)


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json, their pictures, and a LLaVA in base/."""
    write_records(tmp_path)
    model, processor = build_example_base("llava")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    return Image.fromarray(values)


def recipe(folder, *stages, **changes):
    plain = {
        "model": {"base": str(folder / "base")},
        "output": str(folder / "out"),
        "stages": list(stages),
    }
    return parse_recipe({**plain, "stages": list(stages) or [stage(folder)], **changes})


def talk(*turns: str, images=()) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return Example("x", list(images), messages, source="talk.json record 0")


TALKS = [  # conversation, sizes of its pictures
    (talk(f"{IMAGE}\nwhat is it", "a red cat", "are you sure ?", "yes"), [(40, 20)]),
    (talk(f"is {IMAGE} it\n{IMAGE} or", "zebra"), [(16, 30), (64, 48)]),
    (talk("what is blue", "it is a dog", "sure", "a"), []),
]


def test_what_is_learned_follows_exactly_the_prompt_of_inference(base):
    processor = base[1]
    pictures = [[picture(*size) for size in sizes] for _, sizes in TALKS]
    batch = encode_batch(processor, [one for one, _ in TALKS], pictures)
    for row, (one, _) in enumerate(TALKS):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row, :length], batch["labels"][row, :length]
        answers, start = [m["content"] for m in one.messages if m["role"] == "assistant"], 0
        for number, answer in enumerate(answers):
            asked = [
                {**m, "content": m["content"].replace(IMAGE, processor.image_token)}
                for m in one.messages[: 2 * number + 1]
            ]
            prompt = run_processor(
                processor, [render_prompt(processor, asked)], pictures[row : row + 1]
            )["input_ids"][0]
            assert (
                torch.equal(ids[: len(prompt)], prompt)
                and (labels[start : len(prompt)] == -100).all()
            )
            learned = labels[
                len(prompt) :
            ].tolist()  # from the very first token that the model has to say
            learned = learned[: learned.index(-100)] if -100 in learned else learned
            last = number + 1 == len(answers)
            ends = (
                processor.tokenizer.eos_token if last or "im_end" in processor.chat_template else ""
            )
            assert processor.decode(learned).strip() == answer + ends
            start = len(prompt) + len(learned)
        assert (labels[start:] == -100).all() and (batch["labels"][row, length:] == -100).all()


def test_a_batch_is_what_the_processor_makes_of_it(base):
    model, processor = base
    pictures = [[picture(*size) for size in sizes] for _, sizes in TALKS]
    batch = encode_batch(processor, [one for one, _ in TALKS], pictures)
    model(**batch).loss.backward()
    alone = encode_batch(processor, [TALKS[0][0]], pictures[:1])
    length = alone["input_ids"].shape[1]
    assert all(
        torch.equal(alone[name][0], batch[name][0, :length]) for name in ("input_ids", "labels")
    )


def test_shortcuts_are_trained_by_a_recipe_and_the_base_is_not(folder):
    args = {"max_steps": 30, "per_device_train_batch_size": 4}
    model, _ = train(recipe(folder, stage(folder, args=args)), shown=False)
    losses = [line["loss"] for line in log(folder) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    untouched = build_example_base("llava")[0].state_dict()
    assert all(
        torch.equal(value, untouched[name]) for name, value in model.base.state_dict().items()
    )
    files = {path.name for path in (folder / "out" / "final").iterdir()}
    assert {"fusion.safetensors", "fusion.json", "config.yaml", "processor_config.json"} <= files
    assert not files & {"model.safetensors", "config.json"}

    again, processor = load(folder / "out" / "final")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    asked = read_examples(folder / "data.json")
    found = evaluate(again, processor, asked, out=folder / "eval", max_new_tokens=4)
    assert found["num_examples"] == 12 and found["views"]["tiles"] == 2
    said = (folder / "eval" / "predictions.jsonl").read_text()
    for out, off in (("single", ()), ("off", again.fusion.gated)):
        with again.fusion.switched_off(*off):
            evaluate(again, processor, asked, out=folder / out, max_new_tokens=4, batch_size=1)
    assert (folder / "single" / "predictions.jsonl").read_text() == said
    evaluate(*upgrade(folder / "base"), asked, out=folder / "plain", max_new_tokens=4)
    off, plain = (
        json.loads((folder / name / "result.json").read_text()) for name in ("off", "plain")
    )
    assert off["accuracy"] == plain["accuracy"]
    assert (folder / "off" / "predictions.jsonl").read_text() == (
        folder / "plain" / "predictions.jsonl"
    ).read_text()


def test_a_loaded_base_is_trained_too(base, tmp_path):
    write_records(tmp_path)
    before = {name: value.clone() for name, value in base[0].state_dict().items()}
    model, processor = train(recipe(tmp_path), model=base[0], processor=base[1], shown=False)
    assert model.base is base[0]
    assert all(torch.equal(before[name], value) for name, value in model.base.state_dict().items())
    assert any(value.abs().sum() > 0 for value in model.fusion.paths[0].linear_2.parameters())
    asked, said = read_examples(tmp_path / "data.json"), []
    for size in (1, 5):
        evaluate(
            model, processor, asked, max_new_tokens=3, batch_size=size, out=tmp_path / str(size)
        )
        said.append((tmp_path / str(size) / "predictions.jsonl").read_text())
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shortcuts_of_a_half_precision_base_learn_in_single_precision(folder, dtype):
    build_example_base("llava")[0].to(dtype).save_pretrained(folder / "base")
    model, _ = train(
        recipe(folder, stage(folder, args={"bf16": True, "use_cpu": True, "max_steps": 2})),
        shown=False,
    )
    assert next(model.fusion.parameters()).dtype == torch.float32
    assert next(model.base.parameters()).dtype == torch.bfloat16
    assert load(folder / "out" / "final")[0].plan == model.plan


def test_gradient_checkpointing_changes_nothing(folder):
    found = []
    for on in (False, True):
        args = {"activation_checkpointing": on}
        model, _ = train(
            recipe(folder, stage(folder, args=args), output=str(folder / str(on))), shown=False
        )
        found.append(model.fusion.state_dict())
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


class Interrupted(Exception):
    """Stands for a power cut."""


def test_resuming_gives_the_weights_of_an_uninterrupted_run(folder, monkeypatch):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    stages = [stage(folder, args=args), stage(folder, name="two", args=args)]
    whole = train(recipe(folder, *stages, output=str(folder / "whole")), shown=False)[0]
    checkpoint = {path.name for path in (folder / "whole" / "two" / "checkpoint-2").iterdir()}
    assert "fusion.safetensors" in checkpoint and "model.safetensors" not in checkpoint
    step = StageTrainer.training_step

    def fails(self, *arguments, **named):
        if self.stage.name == "two" and self.state.global_step == 3:
            raise Interrupted
        return step(self, *arguments, **named)

    monkeypatch.setattr(StageTrainer, "training_step", fails)
    with pytest.raises(Interrupted):
        train(recipe(folder, *stages), shown=False)
    monkeypatch.setattr(StageTrainer, "training_step", step)
    resumed = train(recipe(folder, *stages), shown=False, resume=True)[0]
    for name, value in whole.fusion.state_dict().items():
        assert torch.equal(value, resumed.fusion.state_dict()[name]), name


def test_a_base_that_was_trained_too_is_saved_with_the_shortcuts(folder):
    stages = [
        stage(folder),
        stage(
            folder, name="two", train=["projector", "fusion", "language"], lr={"projector": 1e-3}
        ),
    ]
    model, _ = train(recipe(folder, *stages), shown=False)
    assert (folder / "out" / "one" / "fusion.json").is_file()
    assert (folder / "out" / "final" / "model.safetensors").is_file()
    untouched = build_example_base("llava")[0]
    changed = {
        n
        for n, value in model.base.state_dict().items()
        if not torch.equal(value, untouched.state_dict()[n])
    }
    assert {name.split(".")[1] for name in changed if name != "lm_head.weight"} == {
        "multi_modal_projector",
        "language_model",
    }
    again, processor = load(folder / "out" / "final")
    inputs = run_processor(processor, ["<image>what is it"], [[picture(20, 30)]])
    assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    again.save_fusion(folder / "alone")
    assert json.loads((folder / "alone" / "fusion.json").read_text())["base"] is None


def test_a_chat_sees_several_pictures_and_remembers_them(folder):
    model, processor = upgrade(folder / "base")
    chat = Chat(model, processor, max_new_tokens=3)
    chat.ask("what is it", picture(20, 30), picture(16, 16))
    said = chat.ask("is <image> red", picture(30, 30))
    assert [m["content"].count(IMAGE) for m in chat.messages] == [2, 0, 1, 0] and len(
        chat.images
    ) == 3
    inputs = run_processor(processor, [render_prompt(processor, chat.messages[:3])], [chat.images])
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    assert processor.batch_decode(ids, skip_special_tokens=True)[0].strip() == said
    assert (
        "".join(Chat(model, processor, max_new_tokens=3).stream("what is it", picture(20, 30)))
        != ""
    )


def test_an_explanation_switches_shortcuts_off_and_measures_what_they_add(folder):
    model, processor = upgrade(folder / "base")
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    asked = read_examples(folder / "data.json")
    found = explain(model, processor, asked, max_new_tokens=3, batch_size=5)
    with model.fusion.switched_off(1):
        assert (
            found["conditions"]["without 1"]["accuracy"]
            == evaluate(model, processor, asked, max_new_tokens=3)["accuracy"]
        )
    first = list({tuple(e.images): e for e in asked if e.images}.values())
    inputs = run_processor(
        processor, ["<image>" * len(e.images) for e in first], [e.load_images() for e in first]
    )
    names = ("pixel_values", "fine_pixel_values")
    beside = model.get_image_features(**{name: inputs[name] for name in names}).pooler_output
    norms = torch.cat(list(beside)).unflatten(-1, (-1, 32)).norm(dim=-1).mean(0).tolist()[1:]
    assert np.allclose([s["norm"] for s in found["shortcuts"][1:]], norms, rtol=1e-4)
    assert write_text(found).count("\n") > 10


def test_contents_in_parts_leave_line_ends_to_the_template():
    kinds = [
        list(part.values())[-1]
        for part in split_at_images("<image>\n<image>\nis <image>\nit\n", "<image>")
    ]
    assert kinds == ["image", "image", "is ", "image", "it\n"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"feature_cache": "kept"}, "feature_cache is 'kept'"),
        ({"template": "plain"}, "record 0: template 'plain' leaves out the prompt format"),
        ({"max_length": 3}, "max_length=3 would cut off image tokens"),
        ({"max_length": 12}, "no token of the .* is left to learn: .* raise max_length"),
        ({"chat_template": None}, "LlavaProcessor has no chat template"),
        (
            {"chat_template": "{% for m in messages %}{{ m['role'] }}{% endfor %}"},
            "writes no <image>",
        ),
        ({"limit": 6}, "has .* tokens, but the language model takes 6"),
        ({"model": {"base": "nowhere/base"}}, "nowhere/base"),
        ({"fusion": "llava"}, "shortcut"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(folder, changes, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = folder / "base" / "config.json"
    for name in set(changes) & {"chat_template"}:
        (folder / "base" / "chat_template.jinja").unlink()
        if changes[name]:
            (folder / "base" / "chat_template.jinja").write_text(changes[name])
    if "limit" in changes:
        plain = json.loads(config.read_text())
        plain["text_config"]["max_position_embeddings"] = changes["limit"]
        config.write_text(json.dumps(plain))
    of_stage = {name: changes[name] for name in set(changes) & {"template", "max_length"}}
    of_recipe = {
        name: changes[name] for name in set(changes) & {"feature_cache", "model", "fusion"}
    }
    with pytest.raises(ValueError, match=sentence):
        train(recipe(folder, stage(folder, **of_stage), **of_recipe), shown=False, check=True)
    assert not (folder / "out").exists()


def test_the_recipe_for_a_large_base_is_whole():
    found = load_recipe(ROOT / "configs" / "upgrade-llava-7b.yaml", ["stages.0.args.use_cpu=true"])
    assert found.model.base == "llava-hf/llava-1.5-7b-hf" and found.stages[0].train == ("fusion",)
    build_arguments(found.stages[0], 0, Path("unused"))
