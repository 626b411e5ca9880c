"""The tiny pretrained VLMs, with processors, of examples/upgrade_vlm.py."""

import importlib.util
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("upgrade_vlm", ROOT / "examples" / "upgrade_vlm.py")
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
KINDS = {"llava": {"view": 16}, "qwen": {"view": 32}}
TEXTS = [
    "what is it is it a red cat yes no ASSISTANT USER user assistant a red dog blue are you sure"
] * 3


def build_example_base(kind: str):
    """(model, processor): a tiny random base of the example."""
    torch.manual_seed(0)
    model, processor = getattr(example, kind)(TEXTS, width=32, vocabulary=300, **KINDS[kind])
    torch.nn.init.normal_(
        model.get_output_embeddings().weight, std=0.5
    )  # so that it says different things
    return model, processor
