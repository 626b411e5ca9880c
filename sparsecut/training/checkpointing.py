"""A Trainer that continues a checkpoint as if undisturbed, or says why it cannot."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import Trainer

from ..adapters import load_checkpoint
from ..modeling_upgraded import WEIGHTS
from ..schema import UserError, read_json_file
from ..upgrading import load_fusion_weights
from .checkpoints import (
    STATE,
    WHOLE,
    check_same_batches,
    discard_checkpoint,
    mark_begun,
    mark_complete,
    remove_old,
)

# What reading files of foreign contents raises, here and in torch, PEFT and transformers.
LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OSError,
    SafetensorError,
    pickle.UnpicklingError,
)
logger = logging.getLogger(__name__)


class CheckpointingTrainer(Trainer):
    """Writes complete checkpoints, and loads all of one or nothing.

    Attributes:
        save_limit: How many checkpoints of the stage stay.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The Trainer would remove all that is called like a checkpoint, also users' copies.
        self.save_limit = self.args.save_total_limit
        self.args.save_total_limit = None

    @property
    def is_sharded(self) -> bool:
        """Whether weights lie in pieces on several processes (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def batch_facts(self) -> dict[str, int]:
        """Facts that a run and its continuation must share, for the batches to be the same."""
        args = self.args
        records = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return {"global_batch": records * args.world_size, "processes": args.world_size}

    # Writing

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint; old ones are removed only after it is marked as complete."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                mark_begun(folder)
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder, self.batch_facts)
                remove_old(folder.parent, self.save_limit, self.state.best_model_checkpoint)
        except Exception as error:  # safetensors, torch and the file system each have their own
            raise discard_checkpoint(folder, error) from error

    def _save(self, output_dir=None, state_dict=None):
        """Save the model: shortcuts alone where the base is unchanged, adapters beside it."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.model.saves_fusion_only:
            super()._save(str(folder), state_dict)
        elif self.args.should_save:
            self.model.save_fusion(folder, state_dict)

    # Continuing

    def _init_training_state(self, max_steps, *args):
        """The Trainer's; refuses a schedule of another length."""
        state = super()._init_training_state(max_steps, *args)
        checkpoint = args[2]
        if checkpoint is not None:
            before = read_json_file(Path(checkpoint) / STATE)["max_steps"]
            if before != max_steps:
                raise UserError(
                    f"the checkpoint {checkpoint} belongs to a stage of {before} steps, but this"
                    f" one has {max_steps}, so the learning rates would differ; use the records and"
                    " arguments that the stage began with"
                )
        return state

    def _run_epoch(self, *args, **kwargs):
        """Run an epoch; nothing is left to do after the checkpoint of the last step.

        The Trainer would take one step more, unless the last step also ends an epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def check_continues(self, checkpoint: Path) -> None:
        """Check that batches are those of a checkpoint; warn where random numbers differ.

        Raises:
            UserError: The batches have another size.
        """
        check_same_batches(checkpoint, self.batch_facts)
        before = read_json_file(checkpoint / WHOLE)["processes"]
        if before != self.args.world_size:
            logger.warning(
                "%s was written by %d processes, and %d continue it: batches are the same, but"
                " random numbers (dropout) differ from those of an undisturbed run",
                checkpoint,
                before,
                self.args.world_size,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load what `_save` has written."""
        with _explain_damage(resume_from_checkpoint, "weights"):
            self._load_weights(Path(resume_from_checkpoint), model)

    def _load_weights(self, folder: Path, model=None) -> None:
        if self.is_sharded:
            super()._load_from_checkpoint(str(folder), model)
            return
        if (folder / WEIGHTS).is_file():
            load_fusion_weights(self.model.fusion, folder)
        load_checkpoint(self.model, folder)

    def _load_best_model(self):
        """Load the best checkpoint, which may hold shortcuts alone, or adapters."""
        best = Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name
        if self.is_sharded:
            self.state.best_model_checkpoint = str(best)  # the run may have been moved since
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The Trainer's; names a file that holds something else."""
        with _explain_damage(checkpoint, "optimizer or schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        """The Trainer's; refuses to start the scale of half-precision gradients anew."""
        has_file = checkpoint is not None and (Path(checkpoint) / "scaler.pt").is_file()
        if checkpoint is not None and self.accelerator.scaler is not None and not has_file:
            raise UserError(
                f"the checkpoint {checkpoint} has no scaler.pt, so the scale of gradients would"
                " start anew; remove or rename that folder, and go on from the one before it"
            )
        with _explain_damage(checkpoint, "scale of gradients"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        """The Trainer's; names a file that holds something else."""
        with _explain_damage(checkpoint, "random state"):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _explain_damage(checkpoint, what: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into a sentence."""
    try:
        yield
    except UserError:
        raise
    except LOAD_ERRORS as error:
        raise UserError(
            f"the {what} of the checkpoint {checkpoint} cannot be loaded"
            f" ({type(error).__name__}: {error}); remove or rename that folder, and go on with"
            " --resume from what was complete before it"
        ) from error
