"""easy-VQA as records: questions about one drawn shape in an image of 64 x 64 pixels.

An id is SPLIT.KIND.IMAGE.NUMBER, with the kinds color, shape and yesno: so patterns in a recipe can
choose a kind, or images. The data set's own training and test images are kept apart. The dev part
is a tenth of the training images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SHAPES = ("circle", "rectangle", "triangle")
DEV_DIGIT = "9"  # training images whose number ends with it are the dev part


def write_easy_vqa(source: Path, out: Path) -> dict[str, int]:
    """Write train.json, dev.json and test.json in LLaVA's format, with their images.

    Args:
        source: The folder `data` of the package easy-vqa.
        out: The folder to write; images lie in its folders train/images and test/images.

    Returns:
        How many records each file has.
    """
    records = {"train": [], "dev": [], "test": []}
    for folder in ("train", "test"):
        shutil.copytree(source / folder / "images", out / folder / "images", dirs_exist_ok=True)
        questions = json.loads((source / folder / "questions.json").read_text(encoding="utf-8"))
        for number, (question, answer, image) in enumerate(questions):
            split = "dev" if folder == "train" and str(image).endswith(DEV_DIGIT) else folder
            name = f"{split}.{get_kind(answer)}.{image}.{number}"
            path = f"{folder}/images/{image}.png"
            records[split].append(make_record(name, path, question, answer))
    for split, rows in records.items():
        (out / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return {split: len(rows) for split, rows in records.items()}


def get_kind(answer: str) -> str:
    """What kind of question an answer belongs to."""
    if answer in ("yes", "no"):
        return "yesno"
    return "shape" if answer in SHAPES else "color"


def make_record(name: str, image: str, question: str, answer: str) -> dict:
    """Make a record of one question in LLaVA's format."""
    turns = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, "image": image, "conversations": turns}
