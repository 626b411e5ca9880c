"""Stopping on SIGTERM, which batch systems send before they kill, and on Ctrl-C.

Training then ends with a checkpoint. A second Ctrl-C stops it at once, without one.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from .progress import print_message


class TrainingInterrupted(InterruptedError):
    """SIGTERM has ended training; a checkpoint of the last step is on disk."""


class StopSignals(TrainerCallback):
    """Ends training after the step in which any process receives SIGTERM or SIGINT.

    All processes then write a checkpoint and stop. Outside the main thread signals cannot be
    caught, and nothing is changed. A signal that this process ignores stays ignored.

    Attributes:
        received: The signal that has arrived, on any process as far as this one knows; else 0.
    """

    def __init__(self):
        self.received = 0
        self._previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Catch the signals from here on; before the first step there is nothing to lose."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end, if any process has received a signal."""
        if args.world_size > 1:
            # Without agreement some processes would wait forever for those that have stopped.
            received = torch.tensor(float(self.received), device=args.device)
            distributed.all_reduce(received, distributed.ReduceOp.MAX)
            self.received = int(received.item())
        if self.received:
            control.should_save = True
            control.should_training_stop = True
        return control

    def close(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def raise_received(self, name: str, state, folder: str) -> None:
        """Raise what says that a signal has ended training, if one has.

        Args:
            name: The stage's name.
            state: The Trainer's state.
            folder: Where the checkpoint lies.

        Raises:
            TrainingInterrupted: SIGTERM arrived.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        if not self.received:
            return
        sender = "SIGTERM" if self.received == signal.SIGTERM else "Ctrl-C"
        message = (
            f"stage {name}: stopped by {sender} after step {state.global_step} of"
            f" {state.max_steps}; its checkpoint is in {folder}; go on with --resume"
        )
        raise (TrainingInterrupted if sender == "SIGTERM" else KeyboardInterrupt)(message)

    def _on_signal(self, number, frame) -> None:
        if number == signal.SIGINT:
            # Whoever presses again does not want to wait for the checkpoint.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print_message("stopping after this step, with a checkpoint; Ctrl-C again stops at once")
        self.received = self.received or number
