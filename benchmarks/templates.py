"""What holds for the chat templates of a folder: labels, prompts, stopping, turns and scores.

    python benchmarks/templates.py FOLDER           # on screen
    python benchmarks/templates.py FOLDER qwen phi  # those with these words in their names
    python benchmarks/templates.py FOLDER --page    # writes docs/support.md, totals over all

The folder is yours, and so are its templates: *.jinja, tokenizer_config.json and
chat_template.json, in folders within it too. Their texts are not part of this project.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import transformers
from helpers.native import byte_tokenizer
from support_page import PAGE, replace_section
from transformers import CLIPImageProcessorPil

from sparsecut.chat_markup import WRAP
from sparsecut.chat_templates.arguments import find_agreeing_arguments, set_arguments
from sparsecut.chat_templates.rendering import get_chat_template
from sparsecut.chat_templates.thoughts import find_open_thought, read_answer
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import IMAGE, Example
from sparsecut.data.labels import IGNORED
from sparsecut.evaluation.judging import judge
from sparsecut.processing import SparseCutProcessor
from sparsecut.prompts import encode_prompts, render_prompt
from sparsecut.schema import UserError

HEADING = "Chat templates"
INTRODUCTION = """\
`make templates FOLDER=...` made this section with transformers {transformers}. It reads the chat
templates of a folder and gives each to a tokenizer with one token per byte. The special tokens are
those that the template or its file names. Records are labelled and asked for as with `build`.

Of {total} templates, {plain} train and score as they are. {argued} more do with an argument, which a
recipe sets in `chat_template_kwargs`. {refused} are refused, and {wrong} are wrong. {endless} of those
that train end answers without a special token. A large folder is shown in part; the totals are of
all.

- *contents*: The template takes strings, or lists of parts only.
- *labels*: Every answer is learned, each in a run of its own.
- *prompt*: The prompt, and what is learned after it, are the text of the whole record.
- *stops*: What is learned ends with a special token. Where it does not, a warning says so.
- *scores*: The answer that is read from the learned tokens scores 1.
- *two turns*, *system*, *image*: Labels, prompt and score hold for two questions, with a system
  turn, and with an image. {no_system} templates refuse system turns alone.

The columns before *two turns* are of one question without an image. A "refused" is an error that
names the record and the reason, before training.
"""
COLUMNS = ("contents", "labels", "prompt", "stops", "scores", "two turns", "system", "image")
NUM_IMAGE_TOKENS = 4
# What looks like a special token. Marks of thoughts are ordinary text in most vocabularies.
SPECIAL = re.compile(r"<(?!/?(?:\w+:)?think)[^<>{}'\"\s]+>|\[/?[A-Z_]+\]|\[\|\w+\|\]|\[e~\[")
QUESTION = "What is this, in a word?"
ANSWER = "a red cat"
RECORDS = {
    "one turn": ([QUESTION, ANSWER], None),
    "two turns": ([QUESTION, ANSWER, "Are you sure?", "Yes, sure."], None),
    "system": ([QUESTION, ANSWER], "Be brief and kind."),
    "image": ([f"{IMAGE}\n{QUESTION}", ANSWER], None),
}
# What the page shows of a large folder.
SHOWN = """
axolotl/alpaca axolotl/chatml axolotl/command_a axolotl/jamba axolotl/llama3_2_vision
axolotl/llama4 axolotl/llava axolotl/mistral_v7_tekken axolotl/phi_4 axolotl/pixtral
axolotl/qwen2_vl axolotl/gemma4 llama.cpp/Apertus-8B-Instruct llama.cpp/ByteDance-Seed-OSS
llama.cpp/GLM-4.6 llama.cpp/GLM-4.7-Flash llama.cpp/HuggingFaceTB-SmolLM3-3B
llama.cpp/Kimi-K2-Instruct llama.cpp/MiMo-VL llama.cpp/MiniMax-M2
llama.cpp/Mistral-Small-3.2-24B-Instruct-2506 llama.cpp/NVIDIA-Nemotron-Nano-v2
llama.cpp/Qwen-QwQ-32B llama.cpp/Qwen3-Coder llama.cpp/deepseek-ai-DeepSeek-V3.1
llama.cpp/ibm-granite-granite-4.0 llama.cpp/meta-llama-Llama-3.3-70B-Instruct
llama.cpp/mistralai-Mistral-Nemo-Instruct-2407 llama.cpp/openai-gpt-oss-120b
trl/cohere2 trl/deepseekv3 trl/gemma trl/gemma3 trl/gptoss trl/idefics3 trl/lfm2 trl/llama3
trl/llava_next trl/muse_glimmer trl/nemotron_3_nano trl/phi3_5 trl/qwen2_5_vl trl/qwen3
trl/qwen3_5_think trl/qwen3_instruct_2507 trl/qwen3_vl trl/smolvlm
"""


@dataclass
class Row:
    """One template's line of the table, and why a cell does not say yes."""

    name: str
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(COLUMNS, ""))
    argument: str = ""
    reasons: dict[str, str] = field(default_factory=dict)  # of each kind of record

    def has(self, word: str) -> bool:
        """Whether a cell of one question says this word."""
        return word in [self.cells[column] for column in ("labels", "prompt", "scores")]

    def is_wrong(self) -> bool:
        """Whether something does not hold that no warning tells."""
        return any(self.cells[column] == "no" for column in COLUMNS if column != "stops")

    def format(self) -> str:
        """The line in Markdown."""
        cells = [self.cells[column] for column in COLUMNS]
        return "| " + " | ".join([f"`{self.name}`", *cells, self.argument]) + " |"


# --- reading templates ---


def read_templates(folder: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Read the templates of a folder as (name, template, special tokens that the file lists)."""
    for path in sorted(folder.rglob("*.jinja")):
        name = str(path.relative_to(folder).with_suffix(""))
        yield name, path.read_text(encoding="utf-8"), []
    for path in sorted(folder.rglob("*.json")):
        if path.name not in ("tokenizer_config.json", "chat_template.json"):
            continue
        settings = json.loads(path.read_text(encoding="utf-8"))
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        if isinstance(template, str):
            yield str(path.relative_to(folder)), template, list_added_tokens(settings)


def list_added_tokens(settings: dict) -> list[str]:
    """The special tokens that a tokenizer_config.json lists."""
    added = settings.get("added_tokens_decoder", {}).values()
    return [token["content"] for token in added if token.get("special")]


def build_processor(template: str, special: list[str]) -> SparseCutProcessor:
    """A processor with this template, its special tokens, and those that the template names."""
    tokenizer = byte_tokenizer(*sorted({*special, *SPECIAL.findall(template), IMAGE}))
    tokenizer.chat_template = template
    return SparseCutProcessor(
        CLIPImageProcessorPil(),
        tokenizer,
        image_size=8,
        tiles=2,
        num_image_tokens=NUM_IMAGE_TOKENS,
    )


# --- trying one ---


def make_example(turns: list[str], system: str | None) -> Example:
    """A conversation, with an image where a turn has a placeholder."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    images = ["a.png"] * sum(turn.count(IMAGE) for turn in turns)
    return Example("x", images, messages, source="record")


def find_learned(labels: list[int]) -> list[tuple[int, int]]:
    """Runs of learned tokens, (first, one after the last)."""
    runs = []
    for i, label in enumerate(labels):
        if label == IGNORED:
            continue
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def check_record(processor, example: Example) -> dict[str, bool]:
    """Label a record and ask for its answers: what holds, by column.

    Raises:
        UserError: The record is refused.
    """
    encoded = example_encoder(processor).encode(example)
    ids = encoded["input_ids"].tolist()
    runs = find_learned(encoded["labels"].tolist())
    messages = example.get_messages(processor.image_token)
    tokenizer = processor.tokenizer
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    holds = {"labels": len(runs) == len(numbers), "prompt": True, "scores": True, "stops": True}
    for number, (start, end) in zip(numbers, runs, strict=False):
        asked = render_prompt(processor, messages[:number])
        learned, answer = tokenizer.decode(ids[start:end]), messages[number]["content"]
        closing = find_open_thought(asked)
        if closing and closing not in learned and number != numbers[-1]:
            closing = None  # the template drops thoughts of earlier answers
        read = read_answer(tokenizer, ids[start:end], closing)
        holds["labels"] &= answer in learned
        holds["scores"] &= judge({"reference": answer}, read, "exact_match")["correct"] == 1
        holds["stops"] &= learned.rstrip().endswith(tuple(tokenizer.all_special_tokens))
    prompt = encode_prompts(processor, [asked], None)["input_ids"][0].tolist()
    rest = tokenizer.decode(ids[runs[-1][1] :]).strip()
    holds["prompt"] = prompt == ids[: runs[-1][0]] and not rest
    image_token = tokenizer.convert_tokens_to_ids(processor.image_token)
    holds["prompt"] &= ids.count(image_token) == NUM_IMAGE_TOKENS * len(example.images)
    return holds


def check_template(name: str, template: str, special: list[str] | None = None) -> Row:
    """Try a template as it is and, where it refuses a record, with an argument that agrees."""
    row = try_template(name, template, special or [], {})
    if not row.has("refused"):
        return row
    try:
        processor = build_processor(template, special or [])
        messages = make_example(*RECORDS["one turn"]).get_messages(processor.image_token)
        found = find_agreeing_arguments(processor, messages)
    except UserError:
        return row
    for argument, value in found[:1]:
        row = try_template(name, template, special or [], {argument: value})
        row.argument = f"`{argument}: {json.dumps(value)}`"
    return row


def try_template(name: str, template: str, special: list[str], arguments: dict) -> Row:
    """All cells of a template with some arguments."""
    row = Row(name)
    for kind, (turns, system) in RECORDS.items():
        columns = ("labels", "prompt", "stops", "scores") if kind == "one turn" else (kind,)
        try:
            processor = build_processor(template, special)
            set_arguments(processor, arguments)
            row.cells["contents"] = "parts" if WRAP in get_chat_template(processor) else "text"
            holds = check_record(processor, make_example(turns, system))
        except UserError as error:
            row.cells.update(dict.fromkeys(columns, "refused"))
            row.reasons[kind] = str(error).removeprefix("record: ")
            continue
        holds[kind] = holds["labels"] and holds["prompt"] and holds["scores"]
        row.cells.update({column: "yes" if holds[column] else "no" for column in columns})
    return row


# --- the page ---


def shorten_reason(reason: str) -> str:
    """A reason without what it quotes, so that templates with the same one stand together."""
    reason = re.sub(r"(refuses the conversation): .*", r"\1", reason, flags=re.S)
    reason = re.sub(r"(?<!\w)'[^']*'|\"[^\"]*\"", "...", reason.split("; ")[0])
    reason = re.sub(r"(is not valid Jinja) \(.*", r"\1", reason, flags=re.S)
    return re.sub(r"\s+", " ", reason).strip()


def group_reasons(rows: list[Row]) -> list[str]:
    """Lines with each reason, and the templates that are refused for it."""
    groups = {}
    for row in rows:
        for kind, reason in row.reasons.items():
            groups.setdefault(shorten_reason(reason), {}).setdefault(row.name, []).append(kind)
    lines = []
    for reason, names in groups.items():
        listed = []
        for name, kinds in names.items():
            whole = len(kinds) == len(RECORDS)
            listed.append(f"`{name}`" + ("" if whole else f" ({', '.join(kinds)})"))
        lines.append(f"- {reason[:1].upper()}{reason[1:]}: {', '.join(listed)}.")
    return lines


def format_page(rows: list[Row]) -> str:
    """The section: totals over all rows, and a table of those in SHOWN, or of all if none is."""
    refused = [row for row in rows if row.has("refused")]
    wrong = [row for row in rows if row not in refused and row.is_wrong()]
    good = [row for row in rows if row not in refused and row not in wrong]
    counts = {
        "transformers": transformers.__version__,
        "total": len(rows),
        "plain": sum(not row.argument for row in good),
        "argued": sum(bool(row.argument) for row in good),
        "refused": len(refused),
        "wrong": len(wrong),
        "endless": sum(row.cells["stops"] == "no" for row in good),
        "no_system": sum(row.cells["system"] == "refused" for row in good),
    }
    shown = [row for row in rows if row.name in SHOWN.split()] or rows
    titles = ["template", *COLUMNS, "argument"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += [row.format() for row in shown]
    reasons = ["Why templates of all are refused:", "", *group_reasons(rows)]
    return "\n".join([INTRODUCTION.format(**counts), *lines, "", *reasons])


def main(arguments: list[str] | None = None, page: Path = PAGE) -> None:
    """Try the templates of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="*", help="only templates with one of these in their names")
    parser.add_argument("--page", action="store_true", help="write the section of docs/support.md")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    rows = []
    for name, template, special in read_templates(options.folder):
        if options.words and not any(word in name for word in options.words):
            continue
        row = check_template(name, template, special)
        rows.append(row)
        print(row.format(), *{f"    {r}": 0 for r in row.reasons.values()}, sep="\n", flush=True)
    if not rows:
        parser.error(f"{options.folder} holds no such chat template")
    if options.page:
        replace_section(HEADING, format_page(rows), page)


if __name__ == "__main__":
    main()
