"""Attribution: a drop stands where the answer is carried, nothing of the model is changed, and
norms are those of a plain computation.
"""

import json
import math

import pytest
import torch
from helpers.runs import write_records
from helpers.tiny import tiny_model

from sparsecut.data.dataset import read_examples
from sparsecut.data.feature_cache import views_of
from sparsecut.evaluation.ablation import (
    PairedStates,
    RememberedStates,
    conditions_of,
    explain,
    shuffled,
)
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.reports.ablation import lines, write_explanation

PLAN = {"method": "sparsecut", "pattern": "sparse", "gate": "one"}  # two shortcuts above the input


@pytest.fixture
def asked(tmp_path):
    """A tiny model and questions whose references are its own answers with every shortcut on."""
    model, processor = tiny_model(PLAN)
    for path in model.fusion.paths:
        path.linear_2.weight.data *= 8  # features as large as the embeddings they join
    examples = read_examples(write_records(tmp_path) / "data.json")
    examples = [e for e in examples if e.images]
    evaluate(model, processor, examples, max_new_tokens=4, out=tmp_path / "own")
    told = [
        json.loads(line)
        for line in (tmp_path / "own" / "predictions.jsonl").read_text().splitlines()
    ]
    for example, line in zip(examples, told, strict=True):
        example.messages[-1]["content"] = line["prediction"]
    return model, processor, examples


def test_conditions_drop_one_keep_one_and_keep_the_input_alone(asked):
    model, *_ = asked
    assert conditions_of(model.fusion) == {
        "all": (),
        "without 1": (1,),
        "without 2": (2,),
        "only 1": (2,),
        "only 2": (1,),
        "input only": (1, 2),
    }


def test_a_shortcut_behind_a_closed_gate_is_worth_nothing_and_the_open_one_all(asked, tmp_path):
    model, processor, examples = asked
    model.fusion.gates.data = torch.tensor([0.0, 1.0])
    evaluate(model, processor, examples, max_new_tokens=4, out=tmp_path / "again")
    told = [
        json.loads(line)
        for line in (tmp_path / "again" / "predictions.jsonl").read_text().splitlines()
    ]
    for example, line in zip(examples, told, strict=True):
        example.messages[-1]["content"] = line["prediction"]
    found = explain(model, processor, examples, max_new_tokens=4)
    write_explanation(found, tmp_path / "out")
    rows = found["conditions"]
    assert (
        rows["all"]["accuracy"] == rows["without 1"]["accuracy"] == rows["only 2"]["accuracy"] == 1
    )
    assert rows["without 1"]["lost"] == rows["without 1"]["gained"] == 0
    assert (
        rows["without 2"]["accuracy"]
        == rows["input only"]["accuracy"]
        == rows["only 1"]["accuracy"]
        < 1
    )
    assert rows["without 2"]["lost"] == round((1 - rows["without 2"]["accuracy"]) * len(examples))
    assert found["shortcuts"][1]["norm"] == 0 < found["shortcuts"][2]["norm"]
    page = (tmp_path / "out" / "explain.html").read_text()
    assert (
        "without 2 (tap" in page
        and "<svg" in page
        and json.loads((tmp_path / "out" / "explain.json").read_text())
    )
    assert lines(found).count("\n") > 8 and (
        tmp_path / "out" / "explain.md"
    ).read_text().startswith("# What each")


def test_nothing_of_the_model_is_changed(asked):
    model, processor, examples = asked
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explain(model, processor, examples[:3], max_new_tokens=2)
    assert not model.fusion.off and all(
        torch.equal(before[n], t) for n, t in model.state_dict().items()
    )
    broken = [examples[0], examples[1]]
    broken[1].messages[0]["content"] = "<image> " + "what is it " * 4000
    with pytest.raises(ValueError):
        explain(model, processor, broken, max_new_tokens=2)
    assert not model.fusion.off


@torch.no_grad()
def test_norms_are_those_of_a_plain_computation(asked):
    model, processor, examples = asked
    found = explain(model, processor, examples[:1], max_new_tokens=2)["shortcuts"]
    states = model.encode(processor.pixels(examples[0].pictures()))
    fused = model.fusion(states)
    for i, shortcut in enumerate(model.plan.shortcuts):
        assert found[i]["norm"] == pytest.approx(
            fused[shortcut.layer].norm(dim=-1).mean().item(), rel=5e-3
        )
    seen = {}
    layers = model.language_model.model.layers
    hooks = [
        layer.register_forward_hook(lambda m, args, out, k=k: seen.update({k + 1: out}))
        for k, layer in enumerate(layers)
    ]
    text = examples[0].messages[0]["content"].replace("<image>", processor.image_token)
    inputs = processor(
        images=examples[0].pictures(), text=f"USER : {text} ASSISTANT :", return_tensors="pt"
    )
    model(**inputs)
    for hook in hooks:
        hook.remove()
    mask = inputs["input_ids"] == model.config.image_token_id
    for i, shortcut in enumerate(model.plan.shortcuts[1:], 1):
        h = seen[shortcut.layer][mask]
        assert found[i]["hidden_norm"] == pytest.approx(h.norm(dim=-1).mean().item(), rel=2e-2)
        cosine = (
            torch.cosine_similarity(fused[shortcut.layer].flatten(0, 1), h, dim=-1).mean().item()
        )
        assert found[i]["cosine"] == pytest.approx(cosine, abs=2e-2)


def test_what_cannot_be_explained_is_refused_in_a_sentence(tmp_path):
    examples = read_examples(write_records(tmp_path) / "data.json")
    with pytest.raises(ValueError, match="no shortcut besides the one into the input"):
        explain(*tiny_model("llava"), examples)
    with pytest.raises(ValueError, match="the list of examples is empty"):
        explain(*tiny_model(PLAN), [])
    with pytest.raises(ValueError, match="none of the questions has a picture"):
        explain(*tiny_model(PLAN), [e for e in examples if not e.images])


def test_a_shuffled_shortcut_reads_the_other_picture_and_the_rest_their_own(asked):
    model, processor, examples = asked
    states = RememberedStates(model, processor, examples)
    views, names = views_of(model.plan, model.config.vision_depth), list(states.kept)
    pairs = PairedStates(states)
    assert all(pairs.next[name] != name for name in names) and set(pairs.next.values()) == set(
        names
    )
    own = {tap: torch.stack([states.kept[name][tap] for name in names]) for tap in views}
    paired = {
        tap: torch.stack([states.kept[n][tap] for name in names for n in (name, pairs.next[name])])
        for tap in views
    }
    plain, hooks = model.fusion(own), len(model.fusion._forward_hooks)
    with shuffled(model.fusion, 2):
        mixed = model.fusion(paired)
    layer = model.plan.shortcuts[2].layer
    assert torch.allclose(mixed[layer], plain[layer].roll(-1, 0), atol=1e-6) and not torch.equal(
        mixed[layer], plain[layer]
    )
    assert all(torch.allclose(mixed[d], plain[d], atol=1e-6) for d in plain if d != layer)
    with pytest.raises(RuntimeError), shuffled(model.fusion, 2):
        raise RuntimeError
    assert len(model.fusion._forward_hooks) == hooks


def test_the_input_only_answers_like_a_plan_of_the_input_alone(asked, tmp_path):
    model, processor, examples = asked
    found = explain(model, processor, examples, max_new_tokens=4)["conditions"]["input only"]
    alone = {
        **model.plan.to_dict(),
        "shortcuts": [model.plan.to_dict()["shortcuts"][model.fusion.main]],
    }
    plain, _ = tiny_model(alone)
    kept = [
        name for name in plain.state_dict() if "gates" not in name
    ]  # the plain plan has no gated shortcut
    plain.load_state_dict({name: model.state_dict()[name] for name in kept}, strict=False)
    assert evaluate(plain, processor, examples, max_new_tokens=4)["num_correct"] == round(
        found["accuracy"] * len(examples)
    )


def test_modes_are_put_back_and_states_beyond_half_precision_are_not_kept(asked, monkeypatch):
    model, processor, examples = asked
    model.train()
    model.vision_tower.eval()
    explain(model, processor, examples[:2], max_new_tokens=2)
    assert model.training and model.fusion.training and not model.vision_tower.training
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda pixels: {tap: 1e6 * x for tap, x in encode(pixels).items()}
    )
    found = explain(model, processor, examples[:2], max_new_tokens=2)
    assert "shuffled 1" not in found["conditions"] and all(
        s["norm"] < float("inf") for s in found["shortcuts"]
    )


@torch.no_grad()
def test_gates_keep_their_sign_and_context_gates_count(tmp_path):
    examples = [e for e in read_examples(write_records(tmp_path) / "data.json") if e.images][:2]
    model, processor = tiny_model(PLAN)
    model.fusion.gates.data = torch.tensor([-0.5, 1.0])
    gates = [s["gate"] for s in explain(model, processor, examples, max_new_tokens=2)["shortcuts"]]
    assert gates == pytest.approx([1.0, -0.5, 1.0])
    model, processor = tiny_model("cli")
    before = explain(model, processor, examples, max_new_tokens=2)["shortcuts"]
    model.fusion.context[str(before[1]["layer"])].bias.fill_(-2.0)
    after, factor = (
        explain(model, processor, examples, max_new_tokens=2)["shortcuts"],
        2 / (1 + math.exp(2)),
    )
    assert before[1]["gate"] == pytest.approx(1, rel=1e-4) and after[1]["gate"] == pytest.approx(
        factor, rel=1e-4
    )
    assert after[1]["norm"] == pytest.approx(factor * before[1]["norm"], rel=1e-4)
