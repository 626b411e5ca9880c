"""The tiny pretrained VLMs, with processors, of examples/upgrade_vlm.py."""

import importlib.util
from pathlib import Path

import torch
from helpers.runs import write_records

from sparsecut import build


def load_example(name: str):
    """Import a file of examples/ as a module."""
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example("upgrade_vlm")
KINDS = {"llava": {"view": 16}, "qwen": {"view": 32}}
TEXTS = [
    "what is it is it a red cat yes no ASSISTANT USER user assistant a red dog blue are you sure"
] * 3


def build_example_base(kind: str):
    """(model, processor): a tiny random base of the example."""
    torch.manual_seed(0)
    model, processor = example.BASES[kind](TEXTS, width=32, vocabulary=300, **KINDS[kind])
    # wide enough for answers that differ
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    return model, processor


def build_audio():
    """(model, processor): a tiny random model of the audio example."""
    torch.manual_seed(0)
    encoder, extractor, language, tokenizer = load_example("audio").build_parts()
    plan = {"method": "sparsecut", "tiles": 0}
    return build(encoder, language, plan, image_processor=extractor, tokenizer=tokenizer)


def run_upgrade_example(kind: str, folder, monkeypatch, capsys) -> None:
    """Run the example for one step on twelve records, and check the rows of its table."""
    write_records(folder)
    for name, pattern in {"KINDS": "", "TONES": "^[0-3]$", "GROUP": "^(.)"}.items():
        monkeypatch.setattr(example, name, pattern)
    example.main(kind, str(folder / "out"), str(folder / "data.json"), str(folder), steps=1)
    expected = [
        "without shortcuts",
        *example.make_controls(kind),
        "upgraded",
        "its shortcuts switched off",
        "its shortcut 1 switched off",
        "its shortcut 2 switched off",
    ]
    lines = capsys.readouterr().out.splitlines()
    names = [line[:28].strip() for line in lines]
    assert [name for name in names if name in expected] == expected
