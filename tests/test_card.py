"""The model card: what it says is true, the hub reads it right, and users' words stay."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.example_bases import build_audio
from helpers.tiny import tiny_model
from huggingface_hub import ModelCard
from PIL import Image

from sparsecut import Plan, make_plan
from sparsecut.building import load, save
from sparsecut.card import ModelFacts, Part, Score, is_unedited, make_card, rename, write_card
from sparsecut.schema import UserError
from sparsecut.sharing import describe_folder, read_scores

FACTS = ModelFacts(
    make_plan("llava", 4, 4), (4, 4), (Part("encoder", None), Part("language model", None))
)
HOSTILE = "a`b|c<script>\x1b[31m\n# heading\u202e"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "mine"
    save(*tiny_model(), folder)
    return folder


def get_block(text: str, language: str) -> str:
    return text.partition(f"```{language}\n")[2].partition("\n```")[0]


def test_the_example_of_a_card_runs_as_printed(saved, monkeypatch, capsys):
    text = (saved / "README.md").read_text()
    example = get_block(text, "python")
    assert len(example.splitlines()) == 5
    monkeypatch.chdir(saved.parent)
    Image.new("RGB", (30, 20), "red").save("photo.png")
    exec(example, {})
    assert "assistant" in capsys.readouterr().out
    assert "channels" in get_block(text, "text") and "input embedding" in text


def test_a_card_that_a_user_has_edited_stays(saved, tmp_path):
    model, processor = load(saved)
    save(model, processor, tmp_path)
    card = tmp_path / "README.md"
    first = card.read_text()
    assert is_unedited(first)
    assert write_card(tmp_path, describe_folder(tmp_path), name="me/new")
    assert 'name = "me/new"' in card.read_text() != first
    for edited in (first.replace("## Scores", "## My scores"), "My model.\n", first + "More.\n"):
        card.write_text(edited)
        save(model, processor, tmp_path)
        assert not write_card(tmp_path, describe_folder(tmp_path))
        assert card.read_text() == edited


def test_a_renamed_card_is_the_card_of_that_name():
    text = make_card(replace(FACTS, data=("x",)), "me/one")
    assert rename(text, "you/one") == make_card(replace(FACTS, data=("x",)), "you/one")
    assert rename("Somebody's card", "you/one") is None


def make_parts(folder, *licenses):
    """Folders of parts with cards that name a licence."""
    parts = []
    for number, name in enumerate(licenses):
        part = folder / f"part{number}"
        part.mkdir()
        if name:
            (part / "README.md").write_text(f"---\nlicense: {name}\n---\nText.\n")
        parts.append(Part("encoder", str(part)))
    return tuple(parts)


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (("mit", "mit"), "mit"),
        (("mit", "apache-2.0"), "other"),
        (("mit", None), None),
        (("llama3",), "llama3"),
        (("my own words",), "other"),
        (("[mit, apache-2.0]",), "other"),
    ],
)
def test_the_licence_is_that_of_all_parts(tmp_path, licenses, expected):
    facts = replace(FACTS, parts=make_parts(tmp_path, *licenses))
    text = make_card(facts, "me/x")
    assert ModelCard(text).data.license == expected
    assert str(tmp_path) not in text, "folders of this machine are nobody's business"
    for name in filter(None, licenses):
        assert f"`{name.strip('[]')}`" in text


def test_parts_on_the_hub_are_named_as_base_models():
    facts = replace(
        FACTS, parts=(Part("encoder", "org/vision"), Part("language model", "org/words"))
    )
    data = ModelCard(make_card(facts, "me/x")).data
    assert data.base_model == ["org/vision", "org/words"]
    assert data.library_name == "transformers"


def test_foreign_names_control_nothing():
    score = Score(HOSTILE, HOSTILE, 50.0, None, 3, HOSTILE)
    facts = replace(FACTS, parts=(Part("base", HOSTILE),), data=(HOSTILE,), scores=(score,))
    text = make_card(facts, f"me/{HOSTILE}")
    assert not {"\x1b", "\u202e"} & set(text)
    assert "\n# heading" not in text
    card = ModelCard(text)
    assert card.data.eval_results[0].metric_value == 50.0
    assert str(card) == text and is_unedited(str(card)), "what reads and writes it changes nothing"
    command = get_block(text, "sh")
    assert "<script>" in command, "in code, nothing is escaped that a shell would read"


def write_result(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def test_scores_stand_in_the_card_with_interval_and_command(tmp_path):
    plain = {"accuracy": 0.5, "interval": [0.4, 0.6], "num_examples": 80}
    command = "sparsecut eval final --data in/ask.json"
    one = write_result(tmp_path / "one", **plain, command=command)
    task = {"task": "pope", "title": "POPE", "num_examples": 9, "command": None}
    main = {"main": {"f1": 70.5, "accuracy": 81.25}}
    share = {"share_right": {"value": 0.8125, "interval": [0.7, 0.9]}}
    write_result(tmp_path / "tasks/pope", **task, **main, **share)
    scores = (*read_scores(one), *read_scores(tmp_path / "tasks"))
    text = make_card(replace(FACTS, scores=scores), "me/x")
    assert "| `ask` | `accuracy` | 50.0 | 40.0 to 60.0 | 80 |" in text
    assert "| `POPE` | `accuracy` | 81.2 | 70.0 to 90.0 | 9 |" in text
    assert "| `POPE` | `f1` | 70.5 |  | 9 |" in text
    assert get_block(text, "sh") == command
    results = ModelCard(text).data.eval_results
    assert {(x.dataset_name, x.metric_type): x.metric_value for x in results} == {
        ("ask", "accuracy"): 50.0,
        ("POPE", "f1"): 70.5,
        ("POPE", "accuracy"): 81.25,
    }


@pytest.mark.parametrize(
    "values", [None, {"num_examples": 3}, {"accuracy": "x", "num_examples": 1}]
)
def test_a_folder_without_scores_is_refused(tmp_path, values):
    if values is not None:
        write_result(tmp_path, **values)
    with pytest.raises(UserError, match="eval --out"):
        read_scores(tmp_path)


def test_the_example_for_audio_runs_as_printed(tmp_path, monkeypatch, capsys):
    soundfile = pytest.importorskip("soundfile")
    save(*build_audio(), tmp_path / "mine")
    example = get_block((tmp_path / "mine/README.md").read_text(), "python")
    assert len(example.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    soundfile.write("clip.wav", np.sin(np.arange(3000) / 9), 16000)
    exec(example, {})
    assert capsys.readouterr().out.startswith("[")


def test_the_plan_of_a_card_is_that_of_the_model(saved):
    facts = describe_folder(saved)
    assert facts.plan == Plan.from_dict(json.loads((saved / "config.json").read_text())["plan"])
    assert facts.depths == (6, 4) and not facts.takes_audio
