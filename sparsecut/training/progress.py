"""What a stage shows and writes while it runs: a progress line on screen, one JSON line per log in
log.jsonl.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from ..data.jsonl import append_json_lines, read_json_lines, write_json_lines

QUIET_SECONDS = 20  # between two lines where the screen is a file


def report(sentence: str) -> None:
    """Show a sentence on screen, beside and not among what a command prints."""
    Console(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)


class StageLog(TrainerCallback):
    """Losses to `folder/log.jsonl` and, if shown, a progress line; silent on all processes but the
    first.

    A line holds step, loss (mean since the last line), grad_norm, lr by part, tokens (seen so far,
    without padding), image_tokens, seconds, memory_gib (the most that was taken), and shortcuts:
    what `ShortcutMonitor` says of each. Where the stage is evaluated while it trains, lines with
    step and eval_loss stand between. `count(tokens, image_tokens)` is called once per batch with
    sums that may still be on the device.
    """

    def __init__(self, stage: str, folder: Path, *, shown: bool = True):
        self.stage, self.file, self.shown = stage, folder / "log.jsonl", shown
        self.tokens = self.image_tokens = 0
        self.rates: dict[str, float] = {}
        self.shortcuts: list[dict] = []
        self.bar = self.task = None
        self.held_out = ""

    def count(self, tokens, image_tokens) -> None:
        """Add one batch to what has been seen."""
        self.tokens, self.image_tokens = self.tokens + tokens, self.image_tokens + image_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the file, or go on with the part of it that lies before the resumed step."""
        self.world_size, self.last = (
            args.world_size,
            {
                "tokens": 0,
                "image_tokens": 0,
                "seconds": 0.0,
            },
        )
        self.started = self.printed = time.perf_counter()
        if not state.is_world_process_zero:
            return
        lines = []
        if self.file.exists() and state.global_step:
            lines = read_json_lines(self.file, skip_partial=True)
        lines = [line for line in lines if line["step"] <= state.global_step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(self.file, lines)
        full = [line for line in lines if "loss" in line]
        self.last = full[-1] if full else self.last
        self.tokens += self.last["tokens"] // self.world_size
        self.image_tokens += self.last["image_tokens"] // self.world_size
        self.started = self.printed = self.started - self.last["seconds"]
        if self.shown:
            self._show(state)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Remember the learning rates of this step, before the schedule moves on."""
        self.rates = {group.get("part", "all"): group["lr"] for group in optimizer.param_groups}

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar; the last step is always logged."""
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)
        control.should_log = control.should_log or state.global_step == state.max_steps
        return control

    def figures(self) -> dict[str, float]:
        """Speed since the last line, of this process's share of the work, and memory, for
        `report_to`.
        """
        took = max(time.perf_counter() - self.started - self.last["seconds"], 1e-9)
        return {
            "tokens_per_second": (int(self.tokens) * self.world_size - self.last["tokens"]) / took,
            "image_tokens_per_second": (
                (int(self.image_tokens) * self.world_size - self.last["image_tokens"]) / took
            ),
            "memory_gib": _memory_gib(),
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a line and refresh the figures on screen."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"]})
            self.held_out = f"  held out {logs['eval_loss']:.3f}"
        if "loss" not in logs:
            return
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": self.rates,
            "tokens": int(self.tokens) * self.world_size,
            "image_tokens": int(self.image_tokens) * self.world_size,
            "seconds": round(time.perf_counter() - self.started, 3),
            "memory_gib": round(logs["memory_gib"], 3),
            "shortcuts": self.shortcuts,
        }
        self._write(line)
        self.last = line
        figures = (
            f"loss {line['loss']:.3f}{self.held_out}  {logs['tokens_per_second']:,.0f} tokens/s "
            f"({logs['image_tokens_per_second']:,.0f} of pictures)  {line['memory_gib']:.1f} GiB"
        )
        if self.bar:
            self.bar.update(self.task, figures=figures)
        elif self.shown and time.perf_counter() - self.printed > QUIET_SECONDS:
            self.printed = time.perf_counter()
            report(f"{self.stage}: step {state.global_step}/{state.max_steps}  {figures}")

    def _write(self, line: dict) -> None:
        append_json_lines(self.file, [line])

    def on_train_end(self, args, state, control, **kwargs):
        """Close the bar."""
        self.close()
        if self.shown and self.bar is None and state.is_world_process_zero and "loss" in self.last:
            report(
                f"{self.stage}: {state.global_step} steps, loss {self.last['loss']:.3f},"
                f" {self.last['seconds']:.0f} s"
            )

    def close(self) -> None:
        """Leave the screen as it is; called too when training stops early."""
        if self.bar:
            self.bar.stop()

    def _show(self, state) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(
            self.stage, total=state.max_steps, completed=state.global_step, figures=""
        )
        self.bar.start()


def _memory_gib() -> float:
    """The most memory taken so far: of the accelerator where there is one, of this process
    otherwise.
    """
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
