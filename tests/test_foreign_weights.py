"""Weights that are not the model's are refused, wherever a model or a part of one is loaded."""

import json
import shutil

import pytest
import torch
from helpers.tiny import tiny_language, tiny_llava, tiny_model, tiny_tokenizer, tiny_vision
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, CLIPImageProcessorPil

from sparsecut import build, upgrade
from sparsecut.building import load, save
from sparsecut.modeling import SparseCutModel
from sparsecut.modeling_upgraded import SparseCutUpgrade, SparseCutUpgradeModel
from sparsecut.schema import UserError

WEIGHTS = "model.safetensors"
HEAD = "language_model.lm_head.weight"
NORM = "language_model.model.norm.weight"


def rewrite(file, change):
    """Put changed weights in the place of a file's; returns the names before."""
    weights = load_file(file)
    names = set(weights)
    save_file(change(dict(weights)) or {}, file, {"format": "pt"})
    return names


def without(part):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


def with_more(**more):
    return lambda weights: weights | {name: torch.zeros(3) for name in more.values()}


def poison(name, value):
    """Change the first value of a weight."""

    def change(weights):
        weights[name].flatten()[0] = value
        return weights

    return change


FOREIGN = {
    "another": lambda weights: {"x": torch.zeros(3)},
    "no fusion": without("fusion."),
    "no encoder": without("vision_tower."),
    "no layer": without("layers.2."),
    "one more path": with_more(x="fusion.paths.9.linear_1.bias"),
    "one more name": with_more(x="something.weight"),
    "not a number": poison(NORM, torch.nan),
    "infinite": poison("fusion.paths.0.linear_2.bias", -torch.inf),
    "another shape": lambda weights: weights | {NORM: torch.zeros(3)},
}
BUILT = (load, AutoModelForImageTextToText.from_pretrained, AutoModel.from_pretrained)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    save(*tiny_model(), folder)
    return folder


@pytest.fixture
def copied(built, tmp_path):
    """A folder with a built model that a test may damage."""
    return shutil.copytree(built, tmp_path / "model")


@pytest.mark.parametrize("how", BUILT)
@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_built_model_with_other_weights_is_refused(copied, how, foreign):
    rewrite(copied / WEIGHTS, FOREIGN[foreign])
    # The Auto classes leave it to transformers to refuse a shape.
    with pytest.raises((UserError, RuntimeError) if foreign == "another shape" else UserError):
        how(copied)


@pytest.mark.parametrize("missing", ["shard", "names", "total"])
def test_an_index_of_shards_that_are_not_all_there_is_refused(tmp_path, missing):
    model, processor = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    processor.save_pretrained(tmp_path)
    assert load(tmp_path)
    file = tmp_path / f"{WEIGHTS}.index.json"
    index = json.loads(file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    if missing == "shard":
        (tmp_path / shards[0]).unlink()
    elif missing == "names":  # a shard that the index does not mention
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shards[0]}
    else:
        file.unlink()
        index = None
    if index:
        file.write_text(json.dumps(index))
    with pytest.raises(UserError):
        load(tmp_path)


def test_a_model_without_a_head_is_not_loaded_as_one_with_a_random_head(built, tmp_path):
    model, processor = load(built)
    headless = SparseCutModel.from_pretrained(built)
    save(headless, processor, tmp_path / "headless")
    with pytest.raises(UserError, match=HEAD):
        load(tmp_path / "headless")
    again = AutoModel.from_pretrained(tmp_path / "headless")
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_what_is_rightly_absent_or_left_over_is_not_refused(tmp_path):
    model, processor = tiny_model(language=tiny_language(tie=True))
    save(model, processor, tmp_path)
    old = {
        "vision_tower.embeddings.position_ids": torch.arange(5),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    names = rewrite(tmp_path / WEIGHTS, lambda weights: weights | old)
    assert HEAD not in names  # it is tied to the embeddings
    again, _ = load(tmp_path)
    assert torch.equal(again.language_model.lm_head.weight, again.get_input_embeddings().weight)
    assert AutoModel.from_pretrained(tmp_path)
    state = model.state_dict()
    assert type(model).from_pretrained(None, config=model.config, state_dict=state)
    del state["fusion.gates"]
    with pytest.raises(UserError, match="gates"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert type(model).from_pretrained(None, config=model.config, state_dict={})


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of an encoder and a language model, each complete with its tools."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tiny_vision().save_pretrained(folder / "vision")
    CLIPImageProcessorPil().save_pretrained(folder / "vision")
    tiny_language().save_pretrained(folder / "language")
    tiny_tokenizer().save_pretrained(folder / "language")
    return folder


@pytest.mark.parametrize(
    "part, damage",
    [
        ("vision", {"x": without("layers.3.")}),
        ("vision", {"x": lambda weights: {"x": torch.zeros(3)}}),
        ("vision", {"num_hidden_layers": 5}),
        ("language", {"x": without("lm_head")}),
        ("language", {"x": without("layers.3.")}),
        ("language", {"num_hidden_layers": 3}),
        ("language", {"num_hidden_layers": 5}),
        ("language", {"hidden_size": 32}),
    ],
)
def test_a_part_with_other_weights_is_refused(parts, tmp_path, part, damage):
    places = {"vision": parts / "vision", "language": parts / "language"}
    assert build(*map(str, places.values()))
    places[part] = folder = shutil.copytree(places[part], tmp_path / part)
    if "x" in damage:
        rewrite(folder / WEIGHTS, damage["x"])
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(UserError, match=str(folder)):
        build(*map(str, places.values()))


def test_a_part_may_lie_in_a_file_with_other_parts(parts, tmp_path):
    """Such as a classifier, or the text tower of CLIP."""
    folder = shutil.copytree(parts / "language", tmp_path / "language")
    rewrite(folder / WEIGHTS, with_more(x="text_model.layers.0.weight", y="logit_scale"))
    assert build(str(parts / "vision"), str(folder))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for part in tiny_llava():
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("damage", ["x", "layers.2.", "lm_head", "multi_modal_projector"])
def test_a_base_with_other_weights_is_refused(base, tmp_path, damage):
    upgraded, _ = upgrade(base)
    upgraded.save_fusion(tmp_path / "shortcuts")
    folder = shutil.copytree(base, tmp_path / "base")
    change = FOREIGN["another"] if damage == "x" else without(damage)
    rewrite(folder / WEIGHTS, change)
    with pytest.raises(UserError, match="missing"):
        upgrade(folder)
    with pytest.raises(UserError, match="missing"):
        load(tmp_path / "shortcuts", folder)


@pytest.mark.parametrize("foreign", ["another", "no fusion", "one more name", "no head"])
def test_an_upgraded_model_with_other_weights_is_refused(base, tmp_path, foreign):
    model, processor = upgrade(base)
    save(model, processor, tmp_path / "whole")
    model.save_fusion(tmp_path / "shortcuts")
    for how in (
        load,
        AutoModelForImageTextToText.from_pretrained,
        SparseCutUpgrade.from_pretrained,
    ):
        assert how(tmp_path / "whole")
    change = without("lm_head") if foreign == "no head" else FOREIGN[foreign]
    rewrite(tmp_path / "whole" / WEIGHTS, change)
    for how in (
        load,
        AutoModelForImageTextToText.from_pretrained,
        SparseCutUpgrade.from_pretrained,
    ):
        with pytest.raises(UserError):
            how(tmp_path / "whole")
    if foreign == "no head":
        assert SparseCutUpgradeModel.from_pretrained(tmp_path / "whole")
    else:
        with pytest.raises(UserError):
            AutoModel.from_pretrained(tmp_path / "whole")


def test_shortcuts_that_are_not_finite_are_refused(base, tmp_path):
    model, _ = upgrade(base)
    model.save_fusion(tmp_path)
    rewrite(tmp_path / "fusion.safetensors", poison("paths.0.linear_1.weight", torch.nan))
    with pytest.raises(UserError, match=r"paths\.0\.linear_1\.weight"):
        load(tmp_path)
