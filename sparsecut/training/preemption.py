"""Stopping when the system asks for it: SIGTERM, which batch systems send before they kill, ends
training with a checkpoint.
"""

from __future__ import annotations

import signal
import threading

import torch
from torch import distributed
from transformers import TrainerCallback


class TrainingInterrupted(InterruptedError):
    """Training was asked to stop, and what it had reached is on disk."""


class SigtermCallback(TrainerCallback):
    """After the step in which SIGTERM arrives, on whichever process, all processes write a
    checkpoint and stop.

    Outside the main thread signals cannot be caught, and nothing is changed.
    """

    def __init__(self):
        self.received = False
        self.before = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Listen from the first step on: before it there is nothing to lose."""
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint and the end, if any process has been told to stop."""
        if args.world_size > 1:
            # Without agreement some would wait forever for those that have stopped.
            told = torch.tensor(float(self.received), device=args.device)
            distributed.all_reduce(told, distributed.ReduceOp.MAX)
            self.received = bool(told.item())
        if self.received:
            control.should_save = control.should_training_stop = True
        return control

    def close(self) -> None:
        """Listen no more."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def _note(self, number, frame) -> None:
        self.received = True
