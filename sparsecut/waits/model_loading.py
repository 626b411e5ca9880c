"""Models that are read from files: one bar of ours, in place of transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .step import Step
from .steps import show_step


@contextmanager
def show_loading(name: Any) -> Iterator[None]:
    """Show that a model is read, inside the block.

    A model of the hub may have to be fetched. Then the bars of huggingface_hub are seen, not ours.

    Args:
        name: A folder, a hub name, or a loaded model, which takes no time.
    """
    if not isinstance(name, str | Path):
        yield
        return
    from transformers.utils import logging

    is_local = Path(name).is_dir()
    with show_step(f"loading {name}", has_own_bars=not is_local) as step:
        if not is_local:
            yield
            return
        previous = logging.set_tqdm_hook(lambda make, args, settings: _Bar(step, *args, **settings))
        try:
            yield
        finally:
            logging.set_tqdm_hook(previous)


class _Bar:
    """What transformers takes for a bar of tqdm; it moves a step."""

    def __init__(self, step: Step, items: Any = None, total: int | None = None, **settings: Any):
        self.step = step
        self.items = items
        if total is None and items is not None:
            total = len(items) if hasattr(items, "__len__") else None
        step.restart(total)

    def __iter__(self) -> Iterator[Any]:
        return self.step.count(self.items)

    def update(self, count: int = 1) -> None:
        self.step.advance(count)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: Any) -> None:
        """The step ends by itself."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **settings: None  # texts beside the bar, and its end
