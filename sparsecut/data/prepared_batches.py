"""Batches that are prepared before the model runs, here or in other processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..schema import UserError


class _Prepared(Dataset):
    """What a function makes of every batch, on access."""

    def __init__(self, prepare: Callable[[Any], dict], batches: Sequence) -> None:
        self.prepare = prepare
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict:
        try:
            return self.prepare(self.batches[index])
        except UserError as error:
            return {"error": error}


def prepare_batches(
    prepare: Callable[[Any], dict], batches: Sequence, workers: int = 0
) -> Iterator[dict]:
    """Yield what a function makes of every batch, in order.

    Args:
        prepare: Makes the inputs of a model from a batch. Other processes must be able to get it.
        batches: The batches.
        workers: Processes that prepare batches while the model runs; 0 prepares them here.

    Raises:
        UserError: A batch has a mistake, such as a broken image. Those before it are yielded.
    """
    prepared = _Prepared(prepare, batches)
    if workers:
        # Without its own generator the loader would draw from the numbers of training.
        prepared = DataLoader(
            prepared,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_use_one_thread,
            generator=torch.Generator(),
        )
    yield from raise_errors(prepared)


def raise_errors(batches: Iterable[dict]) -> Iterator[dict]:
    """Yield batches; raise an error that stands in the place of one.

    A worker process would pass on only the text of an error that it raises.
    """
    for batch in batches:
        if "error" in batch:
            raise batch["error"]
        yield batch


def _use_one_thread(worker_id: int) -> None:
    """Let a worker process use one core, not the whole machine."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
