"""Makes both backbones, each in a process of its own, and writes them as Hugging Face folders in
half precision.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers

from .sizes import SMALL, Size, find_size

NOTE = """# Backbones of the picture world

Made by `sparsecut shapes pretrain --seed {seed} --noise {noise}{more}` with torch {torch} and transformers {transformers}, saved
in float16, licensed like the project (Apache-2.0). `noise` is the standard deviation that made the encoder's top
caption-only; see `sparsecut/world/vision.py`.

What they read, as shares of right answers (the encoder on its own pre-training pictures, before the noise phase):

```json
{shares}
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
    """Train the encoder and the language model, both from `seed`, and write out/vision,
    out/language and out/README.md.

    quick: a few steps, to see that it runs. size: "small" or "large". device: both are made on it
    at the same time. Returns `out`; raises ValueError for another size.
    """
    size, out = find_size(size), Path(out)
    kept = {"seed": seed, "quick": quick, "size": size, "device": device}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(_vision, out, noise=noise, **kept), pool.submit(_language, out, **kept)]
        time = "; about ten minutes" if size == SMALL and not quick else ""
        log(
            f"training the encoder and the language model, one process each{time}; how far:"
            f" {out}/*.log"
        )
        shares = {
            name: run.result() for name, run in zip(("vision", "language"), runs, strict=True)
        }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    more = "" if size == SMALL else f" --size {size.name} --device {device}"
    told = NOTE.format(
        seed=seed, noise=noise, more=more, shares=json.dumps(shares, indent=2), **versions
    )
    (out / "README.md").write_text(told)
    log(f"wrote {out}")
    return out


def _vision(
    out: Path, *, seed: int, noise: float, quick: bool, size: Size, device: str
) -> dict[str, float]:
    from transformers import CLIPImageProcessorPil

    from .vision import MEAN, STD, pretrain_vision

    torch.set_num_threads(1)
    chosen = {
        "seed": seed,
        "size": size,
        "training": size.quick[0] if quick else None,
        "device": device,
    }
    model, shares = pretrain_vision(noise=noise, log=_log(out, "vision"), **chosen)
    side = model.config.image_size
    model.half().save_pretrained(out / "vision")
    square = {"height": side, "width": side}
    processor = CLIPImageProcessorPil(
        size=square, crop_size=square, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor.save_pretrained(out / "vision")
    return shares


def _language(out: Path, *, seed: int, quick: bool, size: Size, device: str) -> dict[str, float]:
    from .language import pretrain_language

    torch.set_num_threads(1)
    chosen = {
        "seed": seed,
        "size": size,
        "training": size.quick[1] if quick else None,
        "device": device,
    }
    model, tokenizer, shares = pretrain_language(log=_log(out, "language"), **chosen)
    model.half().save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    return shares


def _log(out: Path, name: str):
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.log"
    path.unlink(missing_ok=True)

    def log(line: str) -> None:
        with path.open("a") as file:
            file.write(line + "\n")

    return log
