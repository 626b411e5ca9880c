"""Stopping on SIGTERM, which batch systems send before they kill.

Training then ends with a checkpoint.
"""

from __future__ import annotations

import signal
import threading

import torch
from torch import distributed
from transformers import TrainerCallback


class TrainingInterrupted(InterruptedError):
    """SIGTERM has ended training; a checkpoint of the last step is on disk."""


class SigtermCallback(TrainerCallback):
    """Ends training after the step in which any process receives SIGTERM.

    All processes then write a checkpoint and stop. Outside the main thread signals cannot be
    caught, and nothing is changed.

    Attributes:
        received: Whether SIGTERM has arrived, on any process as far as this one knows.
    """

    def __init__(self):
        self.received = False
        self._previous_handler = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Catch the signal from here on; before the first step there is nothing to lose."""
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end, if any process has received the signal."""
        if args.world_size > 1:
            # Without agreement some processes would wait forever for those that have stopped.
            received = torch.tensor(float(self.received), device=args.device)
            distributed.all_reduce(received, distributed.ReduceOp.MAX)
            self.received = bool(received.item())
        if self.received:
            control.should_save = True
            control.should_training_stop = True
        return control

    def close(self) -> None:
        """Restore the handler that was there before."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._previous_handler = None

    def _on_signal(self, number, frame) -> None:
        self.received = True
