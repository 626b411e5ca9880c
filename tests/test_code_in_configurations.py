"""Nothing in a downloaded configuration makes code run, unless the user allows it."""

import contextlib
import json
import shutil

import pytest
from helpers.tiny import tiny_llava, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from sparsecut import build, upgrade
from sparsecut.building import is_saved, load, save
from sparsecut.configuration import SparseCutConfig
from sparsecut.schema import UserError

CODE = "open('ran', 'w')\n"
KERNEL = "owner/kernel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A built model, an upgraded one, a base, an encoder and a language model."""
    place = tmp_path_factory.mktemp("folders")
    model, processor = tiny_model()
    save(model, processor, place / "built")
    for name in ("vision", "language"):
        processor.image_processor.save_pretrained(place / name)
        processor.tokenizer.save_pretrained(place / name)
    model.vision_tower.save_pretrained(place / "vision")
    model.language_model.save_pretrained(place / "language")
    base, base_processor = tiny_llava()
    base.save_pretrained(place / "base")
    base_processor.save_pretrained(place / "base")
    save(*upgrade(base, processor=base_processor), place / "whole")
    return place


@pytest.fixture
def copied(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(folders, tmp_path / "folders")


def put(file, place: str, key: str, value) -> None:
    """Set a key of a JSON file, at a dotted place in it."""
    values = json.loads(file.read_text())
    inner = values
    for part in filter(None, place.split(".")):
        inner = inner[part]
    inner[key] = value
    file.write_text(json.dumps(values))


def build_of(place):
    return build(str(place / "vision"), str(place / "language"))


USES = {
    "built": [
        load,
        is_saved,
        AutoModelForImageTextToText.from_pretrained,
        AutoModel.from_pretrained,
        SparseCutConfig.from_pretrained,
        AutoConfig.from_pretrained,
    ],
    "whole": [load, AutoModelForImageTextToText.from_pretrained, AutoConfig.from_pretrained],
    "base": [upgrade],
    "vision": [lambda folder: build_of(folder.parent)],
    "language": [lambda folder: build_of(folder.parent)],
}
PLACES = [("built", place) for place in ("", "vision_config", "text_config")]
PLACES += [("whole", place) for place in ("", "base_config", "base_config.text_config")]
PLACES += [("base", place) for place in ("", "vision_config")] + [("vision", ""), ("language", "")]


@pytest.mark.parametrize(("folder", "place"), PLACES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", KERNEL),
        ("_attn_implementation", f"paged|{KERNEL}:run"),
        ("_attn_implementation_internal", KERNEL),
        ("_experts_implementation", KERNEL),
        ("attn_implementation", {"": "sdpa", "text_config": f"{KERNEL}@main"}),
    ],
)
def test_an_implementation_from_the_hub_is_refused(copied, folder, place, key, value):
    put(copied / folder / "config.json", place, key, value)
    for use in USES[folder]:
        with pytest.raises(UserError, match=KERNEL):
            use(copied / folder)


def test_implementations_of_transformers_itself_are_taken(copied):
    for place in ("", "text_config"):
        put(copied / "built" / "config.json", place, "_attn_implementation", "eager")
    put(copied / "base" / "config.json", "text_config", "attn_implementation", "sdpa")
    model, _ = load(copied / "built")
    assert model.config.text_config._attn_implementation == "eager"
    assert upgrade(copied / "base")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused_only_where_it_would_be_fetched(copied, monkeypatch, name):
    from sparsecut import loading

    installed = {"kernels"}
    monkeypatch.setattr(loading, "find_spec", lambda package: package in installed or None)
    loading.check_runs_no_code({"text_config": {"_attn_implementation": "flex_attention"}}, "x")
    with pytest.raises(UserError, match=name):
        loading.check_runs_no_code({"text_config": {"_attn_implementation": name}}, "x")
    installed.add("flash_attn")
    loading.check_runs_no_code({"text_config": {"_attn_implementation": name}}, "x")


@pytest.mark.parametrize(("folder", "place"), PLACES)
def test_code_in_a_folder_does_not_run(copied, folder, place):
    """Known kinds of models ignore it, unknown ones are refused without a question."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
    code = {name: f"evil.{name}" for name in names}
    file = copied / folder / "config.json"
    (copied / folder / "evil.py").write_text(CODE)
    put(file, place, "auto_map", code)
    put(file, place, "trust_remote_code", True)
    for use in USES[folder]:
        assert use(copied / folder)
    put(file, place, "model_type", "evil")
    for use in USES[folder]:
        # The configuration class itself does not read its own type.
        if folder == "built" and not place and use == SparseCutConfig.from_pretrained:
            continue
        with pytest.raises(Exception) as refused:
            use(copied / folder)
        is_ours = use in (load, upgrade, is_saved) or folder in ("vision", "language")
        assert not is_ours or refused.type is UserError, refused.value
    assert not list(copied.parent.rglob("ran"))


@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json"])
def test_code_beside_a_processor_does_not_run(copied, file):
    for folder in ("built", "base"):
        (copied / folder / "evil.py").write_text(CODE)
        code = {"AutoProcessor": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        put(copied / folder / file, "", "auto_map", code)
        for key in ("processor_class", "tokenizer_class"):
            put(copied / folder / file, "", key, "Evil")
    for use in (lambda: load(copied / "built"), lambda: upgrade(copied / "base")):
        with contextlib.suppress(UserError):
            use()
    assert not list(copied.parent.rglob("ran"))


def test_code_for_generation_does_not_run(copied):
    code = copied / "built" / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(CODE)
    assert load(copied / "built")
    assert not (copied.parent / "ran").exists()
