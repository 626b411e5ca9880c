"""The picture world: pictures drawn from seeds, questions at three levels, and two small
pre-trained backbones.

high: shape and place. mid: texture and count. low: shade, fine lines and small digits; the coarse view shows next to
nothing of the digits and of the lines mostly whether they are flat or upright. Everything is deterministic, so that a
result can be repeated from its seed. There are two sizes of it (sizes.py): the small one is meant where none is named.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def vision_path() -> Path:
    """Folder of the shipped encoder and its image processor."""
    return WEIGHTS / "vision"


def language_path() -> Path:
    """Folder of the shipped language model and its tokenizer."""
    return WEIGHTS / "language"


def write_split(
    folder,
    split: str,
    num_pictures: int,
    questions_per_picture: int = 12,
    *,
    seed: int = 0,
    workers: int | None = None,
    size: str = "small",
):
    """Draw a split as pictures and LLaVA-format JSON; see `questions.write_split`."""
    from .questions import write_split

    return write_split(
        folder, split, num_pictures, questions_per_picture, seed=seed, workers=workers, size=size
    )


def pretrain(
    out=WEIGHTS,
    *,
    seed: int = 0,
    noise: float = 3.0,
    quick: bool = False,
    size: str = "small",
    device: str = "cpu",
    log=print,
) -> Path:
    """Make both backbones anew and write them to `out`/vision and `out`/language; see
    `pretraining.pretrain`.
    """
    from .pretraining import pretrain

    return pretrain(out, seed=seed, noise=noise, quick=quick, size=size, device=device, log=log)
