"""What a stage shows while it runs: a bar or a line on screen, and one JSON line per log."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from transformers import TrainerCallback

from ..data.jsonl import append_json_lines, read_json_lines, write_json_lines
from ..drawing import escape_controls
from ..waits import Step, pause_display


def print_message(message: str) -> None:
    """Print to stderr, so that it does not mix with what a command prints."""
    message = escape_controls(message)
    with pause_display():
        Console(stderr=True, soft_wrap=True).print(message, highlight=False, markup=False)


class StageLog(TrainerCallback):
    """Writes `log.jsonl` and shows progress; silent on all processes but the first.

    A line of the file holds step, loss (mean since the last line), grad_norm and lr (by part).
    Then come tokens (seen so far, without padding), image_tokens, seconds, memory_gib (the peak)
    and shortcuts (see `ShortcutMonitor`). A stage that is evaluated while it trains also writes
    lines with step and eval_loss.

    Args:
        stage: The stage's name.
        folder: Its folder.
        shown: Whether to print a line at the end.
        step: What shows the steps that are done, and the last figures.

    Attributes:
        tokens: Tokens that this process has seen, also before it was resumed.
        image_tokens: Image tokens among them.
        shortcuts: The next line's values of the shortcuts; the trainer sets it.
    """

    def __init__(
        self, stage: str, folder: Path, *, shown: bool = True, step: Step | None = None
    ) -> None:
        self.stage = stage
        self.file = folder / "log.jsonl"
        self.shown = shown
        self.tokens = 0
        self.image_tokens = 0
        self.shortcuts: list[dict] = []
        self._rates: dict[str, float] = {}
        self._step = step
        self._eval_loss = ""

    def count(self, tokens, image_tokens) -> None:
        """Add one micro-batch; the numbers may still be tensors on the device."""
        self.tokens = self.tokens + tokens
        self.image_tokens = self.image_tokens + image_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the file, or continue the part of it that lies before the resumed step."""
        self.world_size = args.world_size
        self.last_line = {"tokens": 0, "image_tokens": 0, "seconds": 0.0}
        self.start_time = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self._continue_file(state.global_step)
        self.tokens += self.last_line["tokens"] // self.world_size
        self.image_tokens += self.last_line["image_tokens"] // self.world_size
        self.start_time -= self.last_line["seconds"]
        if self._step:
            self._step(state.global_step, state.max_steps)

    def _continue_file(self, step: int) -> None:
        """Keep the lines up to a step, and take the totals of the last one."""
        lines = []
        if step and self.file.exists():
            lines = read_json_lines(self.file, skip_partial=True)
        lines = [line for line in lines if line["step"] <= step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(self.file, lines)
        for line in lines:
            if "loss" in line:
                self.last_line = line

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Note the learning rates of this step, before the schedule moves on."""
        self._rates = {group.get("part", "all"): group["lr"] for group in optimizer.param_groups}

    def on_step_end(self, args, state, control, **kwargs):
        """Move the bar; the last step is always logged."""
        if self._step:
            self._step.set_done(state.global_step)
        control.should_log = control.should_log or state.global_step == state.max_steps
        return control

    def compute_speed(self) -> dict[str, float]:
        """Tokens a second since the last line, and memory, for the Trainer's own logs."""
        elapsed = time.perf_counter() - self.start_time - self.last_line["seconds"]
        elapsed = max(elapsed, 1e-9)
        tokens = int(self.tokens) * self.world_size - self.last_line["tokens"]
        image_tokens = int(self.image_tokens) * self.world_size - self.last_line["image_tokens"]
        return {
            "tokens_per_second": tokens / elapsed,
            "image_tokens_per_second": image_tokens / elapsed,
            "memory_gib": _peak_memory_gib(),
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a line and refresh what is on screen."""
        if not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            self._write({"step": state.global_step, "eval_loss": logs["eval_loss"]})
            self._eval_loss = f"  eval loss {logs['eval_loss']:.3f}"
        if "loss" not in logs:
            return
        line = {
            "step": state.global_step,
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "lr": self._rates,
            "tokens": int(self.tokens) * self.world_size,
            "image_tokens": int(self.image_tokens) * self.world_size,
            "seconds": round(time.perf_counter() - self.start_time, 3),
            "memory_gib": round(logs["memory_gib"], 3),
            "shortcuts": self.shortcuts,
        }
        self._write(line)
        self.last_line = line
        self._show_line(state, line, logs)

    def _show_line(self, state, line: dict, logs: dict) -> None:
        text = (
            f"loss {line['loss']:.3f}{self._eval_loss}  {logs['tokens_per_second']:,.0f} tokens/s"
            f" ({logs['image_tokens_per_second']:,.0f} of images)  {line['memory_gib']:.1f} GiB"
        )
        if self._step:
            self._step.set_done(state.global_step, note=text)

    def _write(self, line: dict) -> None:
        append_json_lines(self.file, [line])

    def on_train_end(self, args, state, control, **kwargs):
        """Print one last line."""
        if not self.shown or not state.is_world_process_zero:
            return
        if "loss" in self.last_line:
            loss = self.last_line["loss"]
            seconds = self.last_line["seconds"]
            print_message(
                f"{self.stage}: {state.global_step} steps, loss {loss:.3f}, {seconds:.0f} s"
            )


def _peak_memory_gib() -> float:
    """Peak memory of the accelerator or, where there is none, of this process."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
