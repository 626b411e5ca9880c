"""Ask the model of the recipe real about test images, and score it beside what text gives away.

    python examples/real/ask.py runs/real

It reads runs/real/trained, which `sparsecut train real` has written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import sparsecut
from sparsecut.data.examples import Example, read_examples
from sparsecut.data.jsonl import read_json_lines
from sparsecut.drawing import text_table
from sparsecut.evaluation.exact_match import exact_match
from sparsecut.experiments.text_baseline import TEXT_BASELINE, write_text_baseline
from sparsecut.schema import UserError

NUM_IMAGES = 5
KINDS = ("color", "shape", "yesno")


def ask_about_images(folder: Path, examples: list[Example]) -> list[list[str]]:
    """Ask one question of each kind about the first test images.

    Args:
        folder: The trained model.
        examples: Questions of the test split.

    Returns:
        Rows of image, question, answer, truth, and whether they agree.
    """
    chosen: dict[str, dict[str, Example]] = {}
    for example in examples:
        _, kind, image, _ = example.id.split(".")
        chosen.setdefault(image, {}).setdefault(kind, example)
    whole = [image for image, by_kind in chosen.items() if len(by_kind) == len(KINDS)]
    model, processor = sparsecut.load(folder)
    rows = []
    for image in whole[:NUM_IMAGES]:
        for kind in KINDS:
            example = chosen[image][kind]
            question, truth = (turn["content"] for turn in example.messages[-2:])
            question = question.removeprefix("<image>\n")
            chat = sparsecut.Chat(model, processor, max_new_tokens=4)
            answer = chat.ask(question, example.load_images()[0])
            verdict = "right" if exact_match(answer, truth) else "wrong"
            rows.append([image, question, answer, truth, verdict])
    return rows


def score_by_kind(data: Path, evaluation: Path, examples: list[Example]) -> list[list[str]]:
    """Score the evaluation's answers by kind, beside the commonest answer to a question's text.

    Args:
        data: The folder of easy-VQA's records.
        evaluation: The folder of an evaluation.
        examples: Questions of the test split.

    Returns:
        Rows of kind, number of questions, per cent of the model and of the text alone.
    """
    answers = {row["id"]: row for row in read_json_lines(evaluation / "predictions.jsonl")}
    asked = [example for example in examples if example.id in answers]
    write_text_baseline(evaluation, read_examples(data / "train.json"), asked)
    by_text = json.loads((evaluation / TEXT_BASELINE).read_text(encoding="utf-8"))
    right = dict(zip(by_text["ids"], by_text["correct"], strict=True))
    rows = []
    scores = []
    for kind in KINDS:
        names = [name for name in right if name.split(".")[1] == kind]
        model = 100 * sum(answers[name]["correct"] for name in names) / len(names)
        text = 100 * sum(right[name] for name in names) / len(names)
        scores.append((model, text))
        rows.append([kind, str(len(names)), f"{model:.1f}", f"{text:.1f}"])
    means = [sum(column) / len(KINDS) for column in zip(*scores, strict=True)]
    return [*rows, ["mean of kinds", str(len(right)), *(f"{mean:.1f}" for mean in means)]]


def main(out: Path) -> None:
    """Print the answers to some questions, and the score."""
    trained = out / "trained"
    if not (trained / "eval" / "predictions.jsonl").exists():
        raise UserError(f"{trained} holds no evaluated model; run sparsecut train real first")
    examples = read_examples(out / "easy-vqa" / "test.json")
    rows = ask_about_images(trained / "final", examples)
    print(text_table([["image", "question", "answer", "truth", ""], *rows]))
    print()
    rows = score_by_kind(out / "easy-vqa", trained / "eval", examples)
    print(text_table([["right, in %", "questions", "model", "text alone"], *rows]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
