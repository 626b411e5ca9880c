"""Every page of the documentation, followed from its first block to its last in one folder.

Commands run as printed, servers too; Python goes on where the block before it ended. What differs
from the page is declared here: what its reader has already, and sizes that would take hours.
"""

import json
from pathlib import Path

import pytest
from helpers.doc_pages import PAGES, PageRun, Setting, read_blocks
from helpers.playground import make_root
from helpers.tiny import tiny_llava, tiny_model

from sparsecut import building
from sparsecut.shapes import write_split
from sparsecut.shapes.questions import split_scene
from sparsecut.shapes.scenes import draw

BASE = "llava-hf/llava-1.5-7b-hf"
QUICK_DEMO = ("sparsecut demo --out runs/demo", "sparsecut demo --quick --out runs/demo")
SMALL_STUDY = (
    ("{train: 2000, ask: 200}", "{train: 40, ask: 8}"),
    ("max_steps: 200", "max_steps: 2"),
    ("max_steps=400", "max_steps=3"),
    ("max_steps: 20,", "max_steps: 2,"),
    ("max_steps: 40", "max_steps: 2"),
    ("max_steps=80", "max_steps=3"),
)
SMALL_UPGRADE = (
    ("$DATA/pictures", "data"),
    ("$DATA", "data"),
    ("count: 8, rank: 256", "count: 2, rank: 8"),
)
OWN_TESTS = {
    "data.md": "tests/data/test_data_page.py",
    "five-minutes.md": "tests/conformance/test_notebook.py",
}


def write_base(folder: Path) -> None:
    """A tiny LLaVA in the place of the one that pages name, and an image with a caption."""
    for part in tiny_llava():
        part.save_pretrained(folder / BASE)
    draw(split_scene("test/0/0")).save(folder / "picture.png")


def write_images(folder: Path) -> None:
    """Two images, as the page on training has them."""
    (folder / "mine").mkdir()
    for i in range(2):
        draw(split_scene(f"test/{i}/0")).save(folder / "mine" / f"{i}.png")


def write_picture(folder: Path) -> None:
    """The image of the page on TRL."""
    draw(split_scene("test/0/0")).save(folder / "picture.png")


def write_benchmarks(folder: Path) -> None:
    """A trained model and the benchmarks in small."""
    make_root(folder / "playground" / "data" / "eval")
    building.save(*tiny_model(), folder / "runs" / "my-model" / "final")


def write_upgrade(folder: Path) -> None:
    """A base, and data in $DATA, which the page's reader has set."""
    write_base(folder)
    path = write_split(str(folder / "data"), "train", 8, 2)["questions"]
    records = json.loads(path.read_text())
    for record in records:  # the base's tokenizer has some thirty words, and none of the shapes'
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = "a cat"
    path.write_text(json.dumps(records))


def write_trained(folder: Path) -> None:
    """A trained model and questions."""
    building.save(*tiny_model(), folder / "runs" / "mine" / "final")
    write_split(str(folder), "dev", 4, 2)["questions"].rename(folder / "ask.json")


def write_demo(folder: Path) -> None:
    """A model where the demo writes it, and an image of the demo."""
    building.save(*tiny_model(), folder / "runs/demo/runs/main/sparsecut/0/final")
    (folder / "runs/demo/data/test").mkdir(parents=True)
    draw(split_scene("test/0/0")).save(folder / "runs/demo/data/test/0.png")


NEEDED = {
    "lmms.md": ["lmms_eval"],
    "serving.md": ["fastapi", "uvicorn", "openai"],
    "trl-and-peft.md": ["trl", "peft"],
    "add-a-method.md": ["fastapi", "uvicorn"],
}
SETTINGS = {
    "README.md": Setting(prepare=write_base),
    "add-a-method.md": Setting(),
    "benchmarks.md": Setting(
        prepare=write_benchmarks, changes=(("--nproc-per-node 8", "--nproc-per-node 2"),)
    ),
    "lmms.md": Setting(prepare=write_demo),
    "method.md": Setting(),
    "recipes.md": Setting(changes=SMALL_STUDY),
    "speed.md": Setting(),
    "serving.md": Setting(changes=(QUICK_DEMO, ("--seconds 60", "--seconds 4"))),
    "share.md": Setting(prepare=write_trained),
    "training.md": Setting(prepare=write_images),
    "trl-and-peft.md": Setting(prepare=write_picture),
    "upgrade.md": Setting(prepare=write_upgrade, changes=SMALL_UPGRADE),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_page_can_be_followed_as_printed(name, tmp_path, monkeypatch):
    for package in NEEDED.get(name, []):
        pytest.importorskip(package)
    page = next(page for page in PAGES if page.name == name)
    for old, _ in SETTINGS[name].changes:
        assert old in page.read_text(), f"{name} no longer has {old!r}"
    monkeypatch.chdir(tmp_path)
    assert PageRun(page, tmp_path, SETTINGS[name]).run() > 0


def test_every_page_with_commands_is_followed():
    for page in PAGES:
        runs = [b for b in read_blocks(page) if b.language in ("bash", "python") and not b.reason]
        assert not runs or page.name in SETTINGS or page.name in OWN_TESTS, page.name
