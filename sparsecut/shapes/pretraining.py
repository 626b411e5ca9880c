"""Trains both backbones, each in its own process, and writes them as Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from ..schema import UserError, read_text_file, write_text_file
from ..waits import end_children_at_error, ignore_ctrl_c, show_step
from .sizes import SMALL, Size, find_size

TITLE = "# Backbones for drawn shapes"
WRITTEN = ("README.md", "vision", "language", "vision.log", "language.log")
NOTE = """# Backbones for drawn shapes

Made by `sparsecut shapes pretrain --seed {seed} --noise {noise}{more}` with torch {torch} and
transformers {transformers}, saved in float16, licensed like the project (Apache-2.0). `noise` is
the standard deviation that made the encoder's top caption-only; see `sparsecut/shapes/vision.py`.

What they read, as fractions of correct answers (the encoder on its own pretraining images, before
the noise phase):

```json
{accuracy}
```
"""


def pretrain(
    out: str | Path,
    *,
    seed: int = 0,
    noise: float = 3.0,
    quick: bool = False,
    size: str | Size = SMALL,
    device: str = "cpu",
    log=print,
) -> Path:
    """Train the encoder and the language model and write them in half precision.

    Args:
        out: Folder; gets vision/, language/ and README.md.
        seed: Seed of both.
        noise: Noise of the encoder's second phase; see `vision.pretrain_vision`.
        quick: Run a few steps only, to see that it works.
        size: "small" or "large".
        device: Both are trained on it, at the same time.
        log: Called with a line of progress.

    Returns:
        The folder.

    Raises:
        UserError: The size is unknown.
    """
    size = find_size(size)
    out = Path(out)
    _check_ours(out)
    write_text_file(out / "README.md", f"{TITLE}\n\nThey are being made.\n")  # whose the folder is
    settings = {"seed": seed, "quick": quick, "size": size, "device": device}
    with (
        show_step("training both backbones"),
        ProcessPoolExecutor(2, get_context("spawn"), ignore_ctrl_c) as pool,
        end_children_at_error(),
    ):
        vision = pool.submit(_train_vision, out, noise=noise, **settings)
        language = pool.submit(_train_language, out, **settings)
        duration = "; about ten minutes" if size == SMALL and not quick else ""
        log(
            f"training the encoder and the language model in a process each{duration};"
            f" progress: {out}/*.log"
        )
        accuracy = {"vision": vision.result(), "language": language.result()}
    more = "" if size == SMALL else f" --size {size.name} --device {device}"
    note = NOTE.format(
        seed=seed,
        noise=noise,
        more=more,
        accuracy=json.dumps(accuracy, indent=2),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    write_text_file(out / "README.md", note)
    log(f"wrote {out}")
    return out


def _check_ours(out: Path) -> None:
    """Make the folder; UserError where files of something else would be replaced."""
    out.mkdir(parents=True, exist_ok=True)
    note = out / "README.md"
    if note.is_file() and read_text_file(note).startswith(TITLE):
        return
    present = [name for name in WRITTEN if (out / name).exists()]
    if present:
        raise UserError(
            f"{out} holds {' and '.join(present)} of something else, which would be replaced; give"
            " another folder, or move it away"
        )


def _train_vision(
    out: Path, *, seed: int, noise: float, quick: bool, size: Size, device: str
) -> dict[str, float]:
    from transformers import CLIPImageProcessorPil

    from .vision import MEAN, STD, pretrain_vision

    torch.set_num_threads(1)
    model, accuracy = pretrain_vision(
        seed=seed,
        noise=noise,
        size=size,
        training=size.quick[0] if quick else None,
        device=device,
        log=_log_to(out, "vision"),
    )
    model.half().save_pretrained(out / "vision")
    side = model.config.image_size
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(
        size=square, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor.save_pretrained(out / "vision")
    return accuracy


def _train_language(
    out: Path, *, seed: int, quick: bool, size: Size, device: str
) -> dict[str, float]:
    from .language import pretrain_language

    torch.set_num_threads(1)
    model, tokenizer, accuracy = pretrain_language(
        seed=seed,
        size=size,
        training=size.quick[1] if quick else None,
        device=device,
        log=_log_to(out, "language"),
    )
    model.half().save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    return accuracy


def _log_to(out: Path, name: str) -> Callable[[str], None]:
    """A function that appends lines to out/NAME.log, which starts empty."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.log"
    path.unlink(missing_ok=True)

    def log(line: str) -> None:
        with path.open("a") as file:
            file.write(line + "\n")

    return log
