"""Makes both backbones, each in a process of its own, and writes them as Hugging Face folders in half precision."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

NOTE = """# Backbones of the picture world

Made by `sparsecut world pretrain --seed {seed} --noise {noise}` with torch {torch} and transformers {transformers}, saved
in float16, licensed like the project (Apache-2.0). `noise` is the standard deviation that made the encoder's top
caption-only; see `sparsecut/world/vision.py`.

What they read, as shares of right answers (the encoder on its own pre-training pictures, before the noise phase):

```json
{shares}
```
"""


def pretrain(out: str | Path, *, seed: int = 0, noise: float = 3.0, quick: bool = False, say=print) -> Path:
    """Train the encoder and the language model, both from `seed`, and write out/vision, out/language and out/README.md.

    quick: a few steps, to see that it runs. Returns `out`.
    """
    out = Path(out)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(_vision, out, seed, noise, quick), pool.submit(_language, out, seed, quick)]
        say("training the encoder and the language model, one process each; about ten minutes")
        shares = {name: run.result() for name, run in zip(("vision", "language"), runs, strict=True)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "README.md").write_text(NOTE.format(seed=seed, noise=noise, shares=json.dumps(shares, indent=2), **versions))
    say(f"wrote {out}")
    return out


def _vision(out: Path, seed: int, noise: float, quick: bool) -> dict[str, float]:
    from transformers import CLIPImageProcessorPil

    from .vision import MEAN, STD, pretrain_vision

    torch.set_num_threads(1)
    size = {"pictures": 64, "steps": (4, 2)} if quick else {}
    model, shares = pretrain_vision(seed=seed, noise=noise, say=_log(out, "vision"), **size)
    side = model.config.image_size
    model.half().save_pretrained(out / "vision")
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(size=square, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    processor.save_pretrained(out / "vision")
    return shares


def _language(out: Path, seed: int, quick: bool) -> dict[str, float]:
    from .language import pretrain_language

    torch.set_num_threads(1)
    model, tokenizer, shares = pretrain_language(
        seed=seed, say=_log(out, "language"), **({"steps": 3} if quick else {})
    )
    model.half().save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    return shares


def _log(out: Path, name: str):
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.log"
    path.unlink(missing_ok=True)

    def say(line: str) -> None:
        with path.open("a") as file:
            file.write(line + "\n")

    return say
