"""States of a frozen encoder on disk, so that every picture is encoded once, whatever is trained on
it and how often.

A folder holds index.json (which encoder, views, pictures and taps) and one file per tap, float16, [pictures, V, N, D]. Files are
read by memory map, so several processes share them. Half precision rounds a state by at most 1 part in 2,048.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..fingerprint import weights_hash
from ..schema import UserError
from .examples import Example

INDEX = "index.json"


class VisionFeatureCache:
    """The states that a folder holds: `read` gives those of some pictures as the model's forward
    takes them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.rows = {key: row for row, key in enumerate(self.index["pictures"])}
        self.views = {int(tap): num_views for tap, num_views in self.index["taps"].items()}
        rest = self.index["num_patches"], self.index["width"]
        self.maps = {
            tap: np.memmap(
                _file(self.folder, tap), np.float16, "r", shape=(len(self.rows), num_views, *rest)
            )
            for tap, num_views in self.views.items()
        }

    def __reduce__(self):
        return VisionFeatureCache, (
            self.folder,
        )  # other processes map the files again instead of being sent their contents

    def read(self, example: Example, views: dict[int, int]) -> dict[int, Tensor]:
        """tap -> float16 [pictures of the example, V, N, D], for the taps and numbers of views
        asked for.
        """
        rows = [self.rows[key] for key in keys_of(example)]
        return {tap: torch.from_numpy(self.maps[tap][rows, :num]) for tap, num in views.items()}

    def blank(self, views: dict[int, int]) -> dict[int, Tensor]:
        """States of no picture: tap -> zeros [1, V, N, D]."""
        rest = self.index["num_patches"], self.index["width"]
        return {tap: torch.zeros(1, num, *rest, dtype=torch.float16) for tap, num in views.items()}

    def covers(self, encoder: str, keys: Iterable[str], views: dict[int, int]) -> bool:
        """Whether all of this is here, made by that encoder; fine views of another grid are
        others.
        """
        deep = all(
            num in (1, self.views.get(tap)) and tap in self.views for tap, num in views.items()
        )
        return self.index["encoder"] == encoder and deep and all(key in self.rows for key in keys)


def views_of(plan, vision_depth: int) -> dict[int, int]:
    """Taps that a plan reads, each with its number of views: the coarse one, or all."""
    fine = plan.fine_taps(vision_depth)
    return {tap: plan.num_views if tap in fine else 1 for tap in plan.resolved_taps(vision_depth)}


def keys_of(example: Example) -> list[str]:
    """A name for each of an example's pictures that no other picture has."""
    where = os.path.abspath(example.store.path) if example.store is not None else ""
    return [
        f"{where}/{i}" if isinstance(i, str) else "sha1:" + hashlib.sha1(i).hexdigest()
        for i in example.images
    ]


def prepare_states(
    folder: str | Path,
    model,
    processor,
    examples: Sequence[Example],
    views: dict[int, int] | None = None,
    *,
    batch_size: int = 32,
    log=lambda line: None,
) -> VisionFeatureCache:
    """Encode all pictures of the examples into `folder`, unless it holds them already, and open it.

    views: tap -> number of views (by default what the model's plan reads; a processor with as many
    tiles is needed). A folder that lacks something is made anew. Raises ValueError where the disk
    is too small, or a state does not fit half precision.
    """
    from ..hooks import read_taps

    folder, depth = Path(folder), model.config.vision_depth
    views = views or views_of(model.plan, depth)
    if max(views.values()) > processor.num_views:
        raise UserError(
            f"states of {max(views.values())} views are wanted, but the processor makes"
            f" {processor.num_views} of a picture; hand over the processor of a plan with as many"
            " tiles"
        )
    pictures = {key: (e, i) for e in examples for i, key in enumerate(keys_of(e))}
    encoder = _encoder_name(model, processor)
    if (folder / INDEX).is_file() and (found := VisionFeatureCache(folder)).covers(
        encoder, pictures, views
    ):
        return found
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    grid = model.config.grid
    patches, width = grid.num_patches, grid.width
    size = 2 * len(pictures) * sum(views.values()) * patches * width
    log(
        f"keeping states of {len(pictures):,} pictures and {len(views)} taps: {size / 2**20:,.0f}"
        f" MiB in {folder}"
    )
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the states need {size:,} bytes, but {folder} has {free:,} free; choose another disk,"
            " or train without keeping states"
        )
    deep = [tap for tap, num in views.items() if num > 1]
    index = {
        "encoder": encoder,
        "num_patches": patches,
        "width": width,
        "taps": views,
        "pictures": list(pictures),
    }
    files = {tap: _file(folder, tap).open("wb") for tap in views}
    todo = list(pictures.values())
    with torch.inference_mode():
        for start in range(0, len(todo), batch_size):
            opened = [e.pictures()[i] for e, i in todo[start : start + batch_size]]
            pixels = processor.pixels(opened).to(
                model.vision_tower.device, model.vision_tower.dtype
            )
            states = read_taps(model.vision_tower, pixels[:, 0], grid, views)
            finer = (
                read_taps(model.vision_tower, pixels[:, 1:].flatten(0, 1), grid, deep)
                if deep
                else {}
            )
            for tap, num in views.items():
                parts = [states[tap][:, None]]
                parts += (
                    [finer[tap].unflatten(0, (len(opened), -1))[:, : num - 1]] if num > 1 else []
                )
                values = torch.cat(parts, dim=1).to("cpu", torch.float16)
                if not values.isfinite().all():
                    raise UserError(
                        f"states of tap {tap} are too large for half precision; train without"
                        " keeping states (remove `states`)"
                    )
                values.numpy().tofile(files[tap])
    for file in files.values():
        file.close()
    (folder / INDEX).write_text(
        json.dumps(index), encoding="utf-8"
    )  # last: a folder that has it is whole
    return VisionFeatureCache(folder)


def _encoder_name(model, processor) -> str:
    """The encoder's weights and all that its pictures go through before it."""
    image = processor.image_processor
    settings = [
        image.do_rescale,
        image.rescale_factor,
        image.do_normalize,
        image.image_mean,
        image.image_std,
    ]
    settings += [processor.image_size, processor.coarse]
    return hashlib.sha256(
        f"{weights_hash(model.vision_tower)} {json.dumps(settings)}".encode()
    ).hexdigest()[:16]


def _file(folder: Path, tap: int) -> Path:
    return folder / f"tap-{tap:02}.f16"
