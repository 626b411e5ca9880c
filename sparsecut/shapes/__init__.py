"""Drawn shapes: images drawn from seeds, questions at three levels, two small pretrained backbones.

high: shape and place. mid: texture and count. low: shade, fine lines and small digits. The coarse
view shows next to nothing of the digits, and of the lines mostly whether they are flat or upright.
Everything is deterministic, so a result can be repeated from its seed. There are two sizes
(sizes.py); the small one is the default.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
EXAMPLE_IMAGE = Path(__file__).parent / "example.png"  # 96 x 96 pixels, of the test split
EXAMPLE_QUESTIONS = (  # with the answers that the image shows
    "what shape is top-right",
    "what texture is bottom-left",
    "what digit is top-left",
)
EXAMPLE_ANSWERS = ("triangle", "checks", "nine")


def vision_path() -> Path:
    """The folder of the shipped encoder and its image processor."""
    return WEIGHTS / "vision"


def language_path() -> Path:
    """The folder of the shipped language model and its tokenizer."""
    return WEIGHTS / "language"


def write_split(
    folder,
    split: str,
    num_images: int,
    questions_per_image: int = 12,
    *,
    seed: int = 0,
    workers: int | None = None,
    size: str = "small",
):
    """Draw a split as images and LLaVA-format JSON; see `questions.write_split`."""
    from .questions import write_split

    return write_split(
        folder, split, num_images, questions_per_image, seed=seed, workers=workers, size=size
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
    """Train both backbones from scratch into `out`; see `pretraining.pretrain`."""
    from .pretraining import pretrain

    return pretrain(out, seed=seed, noise=noise, quick=quick, size=size, device=device, log=log)
