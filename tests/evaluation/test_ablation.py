"""Ablation: accuracy drops where the answer is carried, the model stays as it was, and norms equal
those of a plain computation.
"""

import json
import math

import pytest
import torch
from helpers.fusions import fuse
from helpers.runs import write_records
from helpers.tiny import tiny_model

from sparsecut.data.examples import read_examples
from sparsecut.data.feature_cache import get_tap_views
from sparsecut.evaluation.ablation import (
    FeaturesInMemory,
    PairedFeatures,
    explain,
    list_conditions,
    shuffled,
)
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.reports.ablation import write_explanation, write_text
from sparsecut.schema import UserError

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "one"}  # two shortcuts above the input


def make_model(plan=PLAN):
    """(model, processor) with features as large as the embeddings that they join."""
    model, processor = tiny_model(plan)
    for path in model.fusion.paths:
        path.linear_2.weight.data *= 8
    return model, processor


def set_references(model, processor, examples) -> None:
    """Make the model's own answers the right ones."""
    records = evaluate(model, processor, examples, max_new_tokens=4).records
    for example, record in zip(examples, records, strict=True):
        example.messages[-1]["content"] = record["prediction"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def examples(folder):
    """Nine questions with images; a test may change them."""
    return [e for e in read_examples(folder / "data.json") if e.images]


@pytest.fixture(scope="module")
def shared():
    """(model, processor) that tests leave as they are."""
    return make_model()


def test_conditions_drop_one_keep_one_and_keep_the_input_alone(shared):
    model, _ = shared
    conditions = list_conditions(model.fusion, with_shuffled=True)
    assert {c.name: c.off for c in conditions if c.shuffled is None} == {
        "all": (),
        "without 1": (1,),
        "without 2": (2,),
        "only 1": (2,),
        "only 2": (1,),
        "input only": (1, 2),
    }
    assert [c.name for c in conditions if c.shuffled] == ["shuffled 1", "shuffled 2"]


def test_accuracy_drops_without_the_shortcut_that_carries_the_answer(examples, tmp_path):
    model, processor = make_model()
    model.fusion.gates.data = torch.tensor([0.0, 1.0])  # shortcut 1 adds nothing
    set_references(model, processor, examples)
    explanation = explain(model, processor, examples, max_new_tokens=4)
    rows = explanation["conditions"]
    for name in ("all", "without 1", "only 2"):
        assert rows[name]["accuracy"] == 1
        assert rows[name]["lost"] == rows[name]["gained"] == 0
    for name in ("input only", "only 1"):
        assert rows[name]["accuracy"] == rows["without 2"]["accuracy"] < 1
    assert rows["without 2"]["lost"] == round((1 - rows["without 2"]["accuracy"]) * len(examples))
    assert explanation["shortcuts"][1]["norm"] == 0 < explanation["shortcuts"][2]["norm"]
    # Without shortcuts above the input, the model is one whose plan has the input alone.
    plan = model.plan.to_dict()
    plain, _ = tiny_model({**plan, "shortcuts": [plan["shortcuts"][model.fusion.main]]})
    names = [name for name in plain.state_dict() if "gates" not in name]
    plain.load_state_dict({name: model.state_dict()[name] for name in names}, strict=False)
    plain_result = evaluate(plain, processor, examples, max_new_tokens=4)
    assert plain_result["accuracy"] == rows["input only"]["accuracy"]
    # The report holds all of it.
    write_explanation(explanation, tmp_path)
    assert json.loads((tmp_path / "explain.json").read_text())["num_questions"] == len(examples)
    page = (tmp_path / "explain.html").read_text()
    assert "without 2 (tap" in page
    assert "<svg" in page
    assert (tmp_path / "explain.md").read_text().startswith("# What each")
    assert write_text(explanation).count("\n") > 8


def test_the_model_is_left_as_it_was(examples, monkeypatch):
    model, processor = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.vision_tower.eval()
    explanation = explain(model, processor, examples[:2], max_new_tokens=2)
    assert "shuffled 1" in explanation["conditions"]
    assert model.training
    assert model.fusion.training
    assert not model.vision_tower.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)
    examples[1].messages[0]["content"] = "<image> " + "what is it " * 4000
    with pytest.raises(UserError, match="max_new_tokens=2"):
        explain(model, processor, examples[:2], max_new_tokens=2)
    assert not model.fusion.off
    assert model.training


def test_features_beyond_half_precision_are_not_cached(examples, shared, monkeypatch):
    model, processor = shared
    encode = model.encode

    def encode_large(*args):
        return {tap: 1e6 * x for tap, x in encode(*args).items()}

    monkeypatch.setattr(model, "encode", encode_large)
    explanation = explain(model, processor, examples[:2], max_new_tokens=2)
    assert "shuffled 1" not in explanation["conditions"]
    assert all(math.isfinite(shortcut["norm"]) for shortcut in explanation["shortcuts"])


@torch.no_grad()
def test_norms_are_those_of_a_plain_computation(examples, shared):
    model, processor = shared
    example = examples[0]
    found = explain(model, processor, [example], max_new_tokens=2)["shortcuts"]
    fused = fuse(model.fusion, model.encode(processor.pixels(example.load_images())))
    text = example.messages[0]["content"].replace("<image>", processor.image_token)
    prompt = f"USER : {text} ASSISTANT :"
    inputs = processor(images=example.load_images(), text=prompt, return_tensors="pt")
    hidden = {}
    hooks = []
    for number, layer in enumerate(model.language_model.model.layers, start=1):

        def keep_output(module, args, output, number=number):
            hidden[number] = output

        hooks.append(layer.register_forward_hook(keep_output))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    is_image = inputs["input_ids"] == model.config.image_token_id
    for i, shortcut in enumerate(model.plan.shortcuts):
        added = fused[shortcut.layer].flatten(0, 1)
        assert found[i]["norm"] == pytest.approx(added.norm(dim=-1).mean().item(), rel=5e-3)
        if i == model.fusion.main:
            continue
        before = hidden[shortcut.layer][is_image]
        cosine = torch.cosine_similarity(added, before, dim=-1).mean().item()
        assert found[i]["hidden_norm"] == pytest.approx(before.norm(dim=-1).mean().item(), rel=2e-2)
        assert found[i]["cosine"] == pytest.approx(cosine, abs=2e-2)


def test_what_cannot_be_explained_is_refused(folder, examples, shared):
    with pytest.raises(UserError, match="no shortcut"):
        explain(*tiny_model("llava"), examples)
    with pytest.raises(UserError, match="empty"):
        explain(*shared, [])
    with pytest.raises(UserError, match="image"):
        explain(*shared, read_examples(folder / "texts.json"))


def test_a_shuffled_shortcut_reads_the_other_image_and_the_rest_their_own(examples, shared):
    model, processor = shared
    features = FeaturesInMemory(model, processor, examples)
    views = get_tap_views(model.plan, model.config.vision_depth)
    keys = list(features.features)
    pairs = PairedFeatures(features)
    assert all(pairs.partners[key] != key for key in keys)
    assert set(pairs.partners.values()) == set(keys)
    pair_keys = []
    for key in keys:
        pair_keys += [key, pairs.partners[key]]
    plain = fuse(model.fusion, features.stack(keys, views))
    num_hooks = len(model.fusion._forward_hooks)
    with shuffled(model.fusion, 2):
        mixed = fuse(model.fusion, features.stack(pair_keys, views))
    changed_layer = model.plan.shortcuts[2].layer
    for layer in plain:
        expected = plain[layer].roll(-1, 0) if layer == changed_layer else plain[layer]
        assert torch.allclose(mixed[layer], expected, atol=1e-6)
    assert not torch.equal(mixed[changed_layer], plain[changed_layer])
    with pytest.raises(RuntimeError), shuffled(model.fusion, 2):
        raise RuntimeError
    assert len(model.fusion._forward_hooks) == num_hooks


@torch.no_grad()
def test_gates_have_a_sign_and_context_gates_count(examples):
    model, processor = tiny_model(PLAN)
    model.fusion.gates.data = torch.tensor([-0.5, 1.0])
    shortcuts = explain(model, processor, examples[:1], max_new_tokens=1)["shortcuts"]
    assert [s["gate"] for s in shortcuts] == pytest.approx([1.0, -0.5, 1.0])
    model, processor = tiny_model("cli")
    before = explain(model, processor, examples[:1], max_new_tokens=1)["shortcuts"]
    model.fusion.context[str(before[1]["layer"])].bias.fill_(-2.0)
    after = explain(model, processor, examples[:1], max_new_tokens=1)["shortcuts"]
    factor = 2 / (1 + math.exp(2))
    assert before[1]["gate"] == pytest.approx(1, rel=1e-4)
    assert after[1]["gate"] == pytest.approx(factor, rel=1e-4)
    assert after[1]["norm"] == pytest.approx(factor * before[1]["norm"], rel=1e-4)
