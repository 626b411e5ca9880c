"""What holds for chat templates: training, prompts, labels, stopping and scores, template by template.

python benchmarks/templates.py FOLDER           # every *.jinja; writes docs/support.md
python benchmarks/templates.py FOLDER qwen phi  # those with these words in their names, on screen

The templates are read from a folder of yours. Their texts are not part of this project.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.native import byte_tokenizer
from transformers import CLIPImageProcessorPil

from sparsecut.chat_templates.arguments import find_agreeing_arguments, set_arguments
from sparsecut.chat_templates.rendering import get_chat_template
from sparsecut.chat_templates.thoughts import find_open_thought, read_answer
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import IMAGE, Example
from sparsecut.data.labels import IGNORED
from sparsecut.processing import WRAP, SparseCutProcessor
from sparsecut.prompts import encode_prompts, render_prompt
from sparsecut.schema import UserError

HEADING = "Chat templates"
INTRODUCTION = """\
`make templates FOLDER=...` made this section with transformers {transformers}. It reads public chat
templates from a folder, and gives each to a tokenizer with one token per byte. A record is made of
every template, then labelled, and asked for. {passed} of {total} templates train and score as they
are; {more} more do with the argument that is named, which a recipe sets in `chat_template_kwargs`.

- *contents*: The template takes texts, or lists of parts.
- *one turn*: The prompt, and what is learned after it, are the text of the whole record. What is
  learned is the answer, maybe after a thought, and what ends it.
- *turns*: The same for each answer of two turns. "thoughts dropped" says that the template writes
  earlier answers without the thought of the last one.
- *system*: A system turn is written, or the record is refused.
- *stops*: What is learned ends with a special token.
- *scores*: The answer read from the learned tokens is the reference. So a model that has learned
  the record has accuracy 1.

A "refused" is an error that names the record and the reason, before training.
"""
COLUMNS = ("contents", "one turn", "turns", "system", "stops", "scores")
SPECIAL = re.compile(r"<(?!/?(?:\w+:)?think)[^<>{}'\"\s]+>|\[/?[A-Z_]+\]|\[\|\w+\|\]|\[e~\[")
QUESTION = f"{IMAGE}\nWhat is this, in a word?"
ANSWER = "a red cat"


@dataclass
class Row:
    """One template's line of the table, and why a cell says refused."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    argument: str = ""
    reasons: list[str] = field(default_factory=list)


def build_processor(template: str) -> SparseCutProcessor:
    """A processor with this template and the special tokens that it names."""
    tokens = sorted({*SPECIAL.findall(template), IMAGE})
    tokenizer = byte_tokenizer(*tokens)
    tokenizer.chat_template = template
    return SparseCutProcessor(
        CLIPImageProcessorPil(), tokenizer, image_size=8, tiles=2, num_image_tokens=4
    )


def make_example(*turns: str, system: str | None = None) -> Example:
    """A conversation about one image."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Example("x", ["a.png"], messages, source="record")


def find_learned(encoded: dict) -> list[tuple[int, int]]:
    """Runs of learned tokens, (first, one after the last)."""
    runs = []
    for i, label in enumerate(encoded["labels"].tolist()):
        if label == IGNORED:
            continue
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def read_learned(processor, example: Example) -> tuple[list[str], str, bool]:
    """(answers read from what is learned, the last learned text, whether prompt + learned = all)."""
    encoded = example_encoder(processor).encode(example)
    runs = find_learned(encoded)
    ids = encoded["input_ids"].tolist()
    messages = example.get_messages(processor.image_token)
    prompts = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompts.append(render_prompt(processor, messages[:i]))
    prompt = prompts[-1]
    prompt_ids = encode_prompts(processor, [prompt], None)["input_ids"][0].tolist()
    start, end = runs[-1]
    answers = []
    for (first, last), asked in zip(runs, prompts, strict=True):
        text = processor.tokenizer.decode(ids[first:last])
        closing = find_open_thought(asked)
        closing = closing if closing and closing in text else None
        answers.append(read_answer(processor.tokenizer, ids[first:last], closing).text)
    rest = processor.tokenizer.decode(ids[end:])
    return (
        answers,
        processor.tokenizer.decode(ids[start:end]),
        (prompt_ids == ids[:start] and not rest.strip()),
    )


def check_template(name: str, template: str) -> Row:
    """Try a template as it is and, where it refuses a record, with an argument against thoughts."""
    row = try_template(name, template, {})
    if row.cells["one turn"] == "yes":
        return row
    processor = build_processor(template)
    messages = make_example(QUESTION, ANSWER).get_messages(IMAGE)
    for argument, value in find_agreeing_arguments(processor, messages)[:1]:
        row = try_template(name, template, {argument: value})
        row.argument = f"`{argument}: {str(value).lower()}`"
    return row


def try_template(name: str, template: str, arguments: dict) -> Row:
    """All cells of a template with some arguments."""
    row = Row(name, dict.fromkeys(COLUMNS, ""))
    try:
        processor = build_processor(template)
        set_arguments(processor, arguments)
    except UserError as error:
        row.cells["one turn"] = "refused"
        row.reasons.append(str(error))
        return row
    row.cells["contents"] = "parts" if WRAP in get_chat_template(processor) else "text"
    examples = {
        "one turn": make_example(QUESTION, ANSWER),
        "turns": make_example(QUESTION, ANSWER, "Are you sure?", "Yes, sure."),
        "system": make_example(QUESTION, ANSWER, system="Be brief and kind."),
    }
    for column, example in examples.items():
        try:
            answers, learned, is_whole = read_learned(processor, example)
        except UserError as error:
            row.cells[column] = "refused"
            row.reasons.append(f"{column}: {error}")
            continue
        expected = [m["content"] for m in example.messages if m["role"] == "assistant"]
        row.cells[column] = (
            "yes" if answers == expected and is_whole else f"NO {answers} {learned!r} {is_whole}"
        )
        if column == "one turn":
            special = tuple(processor.tokenizer.all_special_tokens)
            row.cells["stops"] = "yes" if learned.rstrip().endswith(special) else "no"
            row.cells["scores"] = "yes" if answers == expected else "no"
    return row


def main() -> None:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    rows = []
    for path in sorted(folder.glob("*.jinja")):
        if words and not any(word in path.name for word in words):
            continue
        row = check_template(path.stem, path.read_text(encoding="utf-8"))
        print(row.name, row.argument, row.cells)
        for r in row.reasons:
            print("    ", r[:400])
        rows.append(row)


if __name__ == "__main__":
    main()
