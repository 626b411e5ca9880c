"""Records in LLaVA's format for the tests of the data package."""

import json
from pathlib import Path

from sparsecut.data.encoding import example_encoder
from sparsecut.data.length_limits import NO_LIMITS


def make_record(**changes) -> dict:
    """A good record about a.png, with changes."""
    conversations = make_turns(("human", "<image>\nWhat?"), ("gpt", "cat"))
    return {"id": "r", "image": "a.png", "conversations": conversations, **changes}


def make_turns(*turns: tuple[str, str]) -> list[dict]:
    """The turns of a conversation from (who, text)."""
    return [{"from": who, "value": text} for who, text in turns]


def write_data(folder: Path, *records, name: str = "data.json") -> Path:
    """Write records as JSON or, where the name ends in .jsonl, as JSON Lines; return the file."""
    path = folder / name
    lines = [json.dumps(record) for record in records]
    text = "\n".join(lines) if name.endswith(".jsonl") else f"[{','.join(lines)}]"
    path.write_text(text)
    return path


def encode_batch(processor, examples, images, limits=NO_LIMITS) -> dict:
    """The batch of examples whose images are at hand, one list for each example."""
    encoder = example_encoder(processor, limits=limits)
    items = []
    for example, example_images in zip(examples, images, strict=True):
        items.append({**encoder.encode(example), **encoder.encode_images(example_images)})
    return encoder.build_batch(items)


def broken_in(batch: dict) -> list[str]:
    """Messages about the broken records of an item or a batch."""
    return [str(error) for error in batch.get("broken", ())]
