"""From a recipe with a base to answers: the base's own way of doing things, with shortcuts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.example_bases import KINDS, build_example_base
from helpers.records import encode_batch
from helpers.runs import interrupt, log, stage, write_records
from PIL import Image
from safetensors.torch import load_file

from sparsecut import Chat, load, train, upgrade
from sparsecut.config.recipe import load_recipe, parse_recipe
from sparsecut.data.examples import IMAGE, Example, read_examples
from sparsecut.evaluation.ablation import explain
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.prompts import render_prompt, run_processor, split_at_images
from sparsecut.reports.ablation import write_text
from sparsecut.training.arguments import build_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=KINDS)
def base(request):
    """(model, processor): a tiny random base of each kind."""
    return build_example_base(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data.json, texts.json, their images, and a LLaVA in base/."""
    folder = write_records(tmp_path_factory.mktemp("upgrades"))
    model, processor = build_example_base("llava")
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def untouched():
    """Weights of the LLaVA in base/."""
    return build_example_base("llava")[0].state_dict()


def make_image(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_recipe(folder: Path, output: Path, *stages: dict, **changes):
    plain = {
        "model": {"base": str(folder / "base")},
        "output": str(output),
        "stages": list(stages) or [stage(folder)],
    }
    return parse_recipe({**plain, **changes})


def train_upgrade(folder: Path, output: Path, *stages: dict, resume: bool = False):
    """Train shortcuts on the LLaVA in base/; returns the model."""
    return train(make_recipe(folder, output, *stages), shown=False, resume=resume)[0]


def read_predictions(folder: Path) -> str:
    return (folder / "predictions.jsonl").read_text()


def make_talk(*turns: str) -> Example:
    messages = []
    for number, text in enumerate(turns):
        role = "assistant" if number % 2 else "user"
        messages.append({"role": role, "content": text})
    return Example("x", [], messages, source="talk.json record 0")


# Conversations, each with the sizes of its images.
TALKS = [
    (make_talk(f"{IMAGE}\nwhat is it", "a red cat", "are you sure ?", "yes"), [(40, 20)]),
    (make_talk(f"is {IMAGE} it\n{IMAGE} or", "zebra"), [(16, 30), (64, 48)]),
    (make_talk("what is blue", "it is a dog", "sure", "a"), []),
]


def make_talks() -> tuple[list[Example], list[list[Image.Image]]]:
    images = []
    for _, sizes in TALKS:
        images.append([make_image(*size) for size in sizes])
    return [talk for talk, _ in TALKS], images


def test_targets_follow_exactly_the_prompt_of_inference(base):
    processor = base[1]
    talks, images = make_talks()
    batch = encode_batch(processor, talks, images)
    for row, talk in enumerate(talks):
        length = int(batch["attention_mask"][row].sum())
        labels = batch["labels"][row]
        check_learned(
            processor, talk, images[row], batch["input_ids"][row, :length], labels[:length]
        )
        assert (labels[length:] == -100).all()


def check_learned(processor, talk: Example, images: list, ids, labels) -> None:
    """Assert that the answers of a conversation have labels, from their first token on."""
    ends_turns = "im_end" in processor.chat_template
    start = 0
    for number, message in enumerate(talk.messages):
        if message["role"] == "user":
            continue
        messages = []
        for earlier in talk.messages[:number]:
            content = earlier["content"].replace(IMAGE, processor.image_token)
            messages.append({**earlier, "content": content})
        prompt = run_processor(processor, [render_prompt(processor, messages)], [images])
        prompt_ids = prompt["input_ids"][0]
        assert torch.equal(ids[: len(prompt_ids)], prompt_ids)
        assert (labels[start : len(prompt_ids)] == -100).all()
        answer = labels[len(prompt_ids) :].tolist()
        answer = answer[: answer.index(-100)] if -100 in answer else answer
        is_last = number == len(talk.messages) - 1
        end = processor.tokenizer.eos_token if is_last or ends_turns else ""
        assert processor.decode(answer).strip() == message["content"] + end
        start = len(prompt_ids) + len(answer)
    assert (labels[start:] == -100).all()


def test_a_batch_is_what_the_processor_makes_of_it(base):
    model, processor = base
    talks, images = make_talks()
    batch = encode_batch(processor, talks, images)
    model(**batch).loss.backward()
    alone = encode_batch(processor, talks[:1], images[:1])
    length = alone["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        assert torch.equal(alone[name][0], batch[name][0, :length])


@pytest.fixture(scope="module")
def trained(folder):
    """(model, folder): shortcuts trained for thirty steps on the LLaVA in base/."""
    args = {"max_steps": 30, "per_device_train_batch_size": 4}
    return train_upgrade(folder, folder / "out", stage(folder, args=args)), folder


def test_shortcuts_are_trained_by_a_recipe_and_the_base_is_not(trained, untouched):
    model, folder = trained
    losses = [line["loss"] for line in log(folder) if "loss" in line]
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, untouched[name])


def test_shortcuts_are_saved_without_the_base_and_load_with_it(trained):
    model, folder = trained
    files = {path.name for path in (folder / "out" / "final").iterdir()}
    assert {"fusion.safetensors", "fusion.json", "config.yaml", "processor_config.json"} <= files
    assert not files & {"model.safetensors", "config.json"}
    loaded, _ = load(folder / "out" / "final")
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


def test_the_best_shortcuts_are_kept_also_by_a_run_that_is_continued(folder, tmp_path):
    """It is evaluated on answers that it unlearns; checkpoints hold the shortcuts alone."""
    args = {
        "max_steps": 6,
        "learning_rate": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    records = json.loads((folder / "data.json").read_text())
    for record in records:
        record["conversations"][1]["value"] = "zebra zebra"
    (tmp_path / "other.json").write_text(json.dumps(records))
    evaluated = {"data": {"path": str(tmp_path / "other.json"), "images": str(folder)}}
    given = make_recipe(folder, tmp_path / "out", stage(folder, args=args), evaluate=evaluated)
    with interrupt("one", step=5):
        train(given, shown=False)
    model, _ = train(given, shown=False, resume=True)
    losses = {line["step"]: line["eval_loss"] for line in log(tmp_path) if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < 6, losses
    kept = {path.name for path in (tmp_path / "out" / "one").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-6"}
    weights = load_file(tmp_path / "out" / "one" / f"checkpoint-{best}" / "fusion.safetensors")
    loaded, _ = load(tmp_path / "out" / "final")
    for name, value in weights.items():
        assert torch.equal(value, model.fusion.state_dict()[name])
        assert torch.equal(value, loaded.fusion.state_dict()[name])


def test_answers_depend_on_shortcuts_and_not_on_the_batch(trained, tmp_path):
    model, folder = trained
    processor = load(folder / "out" / "final")[1]
    examples = read_examples(folder / "data.json")
    settings = {"max_new_tokens": 4}
    result = evaluate(model, processor, examples, out=tmp_path / "eval", **settings)
    assert result["num_examples"] == 12
    assert result["views"]["tiles"] == 2
    evaluate(model, processor, examples, out=tmp_path / "single", batch_size=1, **settings)
    assert read_predictions(tmp_path / "single") == read_predictions(tmp_path / "eval")
    with model.fusion.switched_off(*model.fusion.gated):
        off = evaluate(model, processor, examples, out=tmp_path / "off", batch_size=1, **settings)
    plain = evaluate(*upgrade(folder / "base"), examples, out=tmp_path / "plain", **settings)
    assert off["accuracy"] == plain["accuracy"]
    assert read_predictions(tmp_path / "off") == read_predictions(tmp_path / "plain")


def test_a_loaded_base_is_trained_too(base, folder, tmp_path):
    before = {name: value.clone() for name, value in base[0].state_dict().items()}
    given = make_recipe(folder, tmp_path / "out")
    model, processor = train(given, model=base[0], processor=base[1], shown=False)
    assert model.base is base[0]
    for name, value in model.base.state_dict().items():
        assert torch.equal(before[name], value)
    assert any(value.abs().sum() > 0 for value in model.fusion.paths[0].linear_2.parameters())
    examples = read_examples(folder / "data.json")
    for size in (1, 5):
        out = tmp_path / str(size)
        evaluate(model, processor, examples, max_new_tokens=3, batch_size=size, out=out)
    assert read_predictions(tmp_path / "1") == read_predictions(tmp_path / "5")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shortcuts_of_a_half_precision_base_are_trained_in_single_precision(
    folder, tmp_path, dtype
):
    shutil.copytree(folder / "base", tmp_path / "base")
    build_example_base("llava")[0].to(dtype).save_pretrained(tmp_path / "base")
    args = {"bf16": True, "use_cpu": True, "max_steps": 2}
    model = train_upgrade(tmp_path, tmp_path / "out", stage(folder, args=args))
    assert next(model.fusion.parameters()).dtype == torch.float32
    assert next(model.base.parameters()).dtype == torch.bfloat16
    assert load(tmp_path / "out" / "final")[0].plan == model.plan


def test_gradient_checkpointing_changes_nothing(folder, tmp_path):
    weights = []
    for checkpointing in (False, True):
        args = {"activation_checkpointing": checkpointing}
        output = tmp_path / str(checkpointing)
        model = train_upgrade(folder, output, stage(folder, args=args))
        weights.append(model.fusion.state_dict())
    for name, value in weights[0].items():
        assert torch.allclose(value, weights[1][name], atol=1e-6)


def test_resuming_gives_the_weights_of_an_uninterrupted_run(folder, tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    stages = [stage(folder, args={"max_steps": 1}), stage(folder, name="two", args=args)]
    whole = train_upgrade(folder, tmp_path / "whole", *stages)
    files = {path.name for path in (tmp_path / "whole" / "two" / "checkpoint-2").iterdir()}
    assert "fusion.safetensors" in files
    assert "model.safetensors" not in files
    with interrupt("two", step=3):
        train_upgrade(folder, tmp_path / "out", *stages)
    resumed = train_upgrade(folder, tmp_path / "out", *stages, resume=True)
    for name, value in whole.fusion.state_dict().items():
        assert torch.equal(value, resumed.fusion.state_dict()[name]), name


def test_a_base_that_was_trained_too_is_saved_with_the_shortcuts(folder, tmp_path, untouched):
    parts = ["projector", "fusion", "language"]
    second = stage(folder, name="two", train=parts, lr={"projector": 1e-3})
    model = train_upgrade(folder, tmp_path / "out", stage(folder), second)
    assert (tmp_path / "out" / "one" / "fusion.json").is_file()
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    changed = set()
    for name, value in model.base.state_dict().items():
        if name != "lm_head.weight" and not torch.equal(value, untouched[name]):
            changed.add(name.split(".")[1])
    assert changed == {"multi_modal_projector", "language_model"}
    loaded, processor = load(tmp_path / "out" / "final")
    inputs = run_processor(processor, ["<image>what is it"], [[make_image(20, 30)]])
    assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    loaded.save_fusion(tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "fusion.json").read_text())["base"] is None


def test_a_chat_sees_several_images_and_remembers_them(folder):
    model, processor = upgrade(folder / "base")
    chat = Chat(model, processor, max_new_tokens=3)
    chat.ask("what is it", make_image(20, 30), make_image(16, 16))
    answer = chat.ask("is <image> red", make_image(30, 30))
    assert [message["content"].count(IMAGE) for message in chat.messages] == [2, 0, 1, 0]
    assert len(chat.images) == 3
    prompt = render_prompt(processor, chat.messages[:3])
    inputs = run_processor(processor, [prompt], [chat.images])
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new_ids = ids[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(new_ids, skip_special_tokens=True)[0].strip() == answer
    streamed = Chat(model, processor, max_new_tokens=3).stream("what is it", make_image(20, 30))
    assert "".join(streamed) != ""


def test_an_explanation_switches_shortcuts_off_and_measures_what_they_add(folder):
    model, processor = upgrade(folder / "base")
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    examples = read_examples(folder / "data.json")
    explanation = explain(model, processor, examples, max_new_tokens=3, batch_size=5)
    with model.fusion.switched_off(1):
        without = evaluate(model, processor, examples, max_new_tokens=3)
    assert explanation["conditions"]["without 1"]["accuracy"] == without["accuracy"]
    norms = measure_norms(model, processor, examples)
    assert np.allclose([s["norm"] for s in explanation["shortcuts"][1:]], norms, rtol=1e-4)
    assert write_text(explanation).count("\n") > 10


def measure_norms(model, processor, examples: list[Example]) -> list[float]:
    """Mean norms of the features above the input, over images that differ."""
    different = {tuple(example.images): example for example in examples if example.images}
    images = [example.load_images() for example in different.values()]
    inputs = run_processor(processor, ["<image>" * len(group) for group in images], images)
    features = model.get_image_features(
        pixel_values=inputs["pixel_values"], fine_pixel_values=inputs["fine_pixel_values"]
    )
    by_layer = torch.cat(list(features.pooler_output)).unflatten(-1, (-1, 32))
    return by_layer.norm(dim=-1).mean(0).tolist()[1:]


def test_contents_in_parts_leave_line_ends_to_the_template():
    parts = split_at_images("<image>\n<image>\nis <image>\nit\n", "<image>")
    values = [list(part.values())[-1] for part in parts]
    assert values == ["image", "image", "is ", "image", "it\n"]


def check_refused(folder: Path, tmp_path: Path, match: str, *, of_stage=None, **changes) -> None:
    """Assert that a recipe with changes is refused before anything is written."""
    given = make_recipe(folder, tmp_path / "out", stage(folder, **(of_stage or {})), **changes)
    with pytest.raises(ValueError, match=match):
        train(given, shown=False, check=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"template": "plain"}, "record 0: .*'plain'"),
        ({"max_length": 3}, "max_length=3"),
        ({"max_length": 12}, "record 0: .*max_length"),
    ],
)
def test_a_stage_that_a_base_cannot_be_trained_by_is_refused(folder, tmp_path, changes, match):
    check_refused(folder, tmp_path, match, of_stage=changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"feature_cache": "kept"}, "feature_cache is 'kept'"),
        ({"model": {"base": "nowhere/base"}}, "nowhere/base"),
        ({"fusion": "llava"}, "shortcut"),
    ],
)
def test_a_recipe_that_a_base_cannot_be_trained_by_is_refused(folder, tmp_path, changes, match):
    check_refused(folder, tmp_path, match, **changes)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "LlavaProcessor has no chat template"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "<image>"),
    ],
)
def test_a_chat_template_without_images_is_refused(folder, tmp_path, template, match):
    shutil.copytree(folder / "base", tmp_path / "base")
    file = tmp_path / "base" / "chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template)
    check_refused(folder, tmp_path, match, model={"base": str(tmp_path / "base")})


def test_records_that_are_longer_than_the_base_takes_are_refused(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    plain = json.loads(file.read_text())
    plain["text_config"]["max_position_embeddings"] = 6
    file.write_text(json.dumps(plain))
    check_refused(folder, tmp_path, "tokens.* 6", model={"base": str(tmp_path / "base")})


def test_the_recipe_for_a_large_base_is_whole():
    path = ROOT / "sparsecut" / "recipes" / "upgrade-llava-7b.yaml"
    recipe = load_recipe(path, ["stages.0.args.use_cpu=true"])
    assert recipe.model.base == "llava-hf/llava-1.5-7b-hf"
    assert recipe.stages[0].train == ("fusion",)
    build_arguments(recipe.stages[0], 0, Path("unused"))
