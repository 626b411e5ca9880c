"""The Hugging Face Trainer of one stage.

It adds what a stage needs: frozen parts, learning rates by part, complete checkpoints, and errors
that stop a run which cannot train.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler as HfLengthGroupedSampler
from transformers.trainer_utils import has_length

from ..adapters import get_adapters
from ..config.recipe import Stage
from ..data.dataset import get_blank_image_inputs, make_blank_item, raise_errors
from ..data.labels import IGNORED
from ..data.packing import LengthGroupedSampler, PackedDataset, check_packing
from ..data.streaming import Stream
from ..encoders import FREE_SIZE_KINDS
from ..schema import UserError
from .checkpointing import CheckpointingTrainer
from .checkpoints import check_disk_space
from .freezing import (
    freeze_unused_vision_blocks,
    get_frozen_modules,
    get_part_names,
    reach_without_images,
)
from .progress import StageLog
from .run_dir import SKIPPED
from .shortcut_stats import ShortcutMonitor
from .stop_signals import StopSignals

MIN_BROKEN = 10  # broken records that any stage may have


class LossNotFinite(UserError):
    """The loss has become infinite or NaN, most often because the learning rate is too high."""


class StageTrainer(CheckpointingTrainer):
    """Trains one stage.

    Errors do not name the stage: `stages.train_stage` puts its name in front.

    Args:
        stage: The stage.
        log: The stage's log.
        mixture: Number of records and weight of every source, where the stage mixes sources.
        *args: Passed to `Trainer`.
        **kwargs: Passed to `Trainer`.

    Raises:
        UserError: If the engine, adapters or packed rows cannot work with this model.
    """

    def __init__(self, *args, stage: Stage, log: StageLog, mixture=None, **kwargs):
        self.stop_signals = StopSignals()
        self.mixture = mixture
        try:
            super().__init__(*args, callbacks=[log, self.stop_signals], **kwargs)
        except ValueError as error:
            raise UserError(f"transformers' Trainer refuses args: {error}") from error
        self.stage = stage
        self.stage_log = log
        self._check_engine()
        if stage.loss_over == "batches":
            # Then the Trainer averages over micro-batches and processes.
            self.model_accepts_loss_kwargs = False
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        compiled = self.args.torch_compile
        rate = stage.lr.get("fusion", self.args.learning_rate) if "fusion" in stage.train else None
        self.monitor = ShortcutMonitor(self.model.fusion, stage.name, compiled=compiled, rate=rate)
        self.frozen_modules = get_frozen_modules(self.model, stage)
        self._prepare_image_parameters()

    def _prepare_image_parameters(self) -> None:
        """Find the parameters that only images reach, and freeze those that none reaches."""
        parts = self.model.parameter_groups()
        parameters = [*parts["vision"], *parts.get("projector", ())]
        data = self.train_dataset
        blank = make_blank_item(data.encoder, data.feature_cache, data.tap_views)
        # DeepSpeed may hold parameters in pieces from the start.
        is_whole = not any(hasattr(parameter, "ds_id") for parameter in parameters)
        if is_whole and isinstance(data, PackedDataset):
            check_packing(self.model, self.data_collator, data)
        if is_whole and any(parameter.requires_grad for parameter in parameters):
            image_inputs = get_blank_image_inputs(blank, data.encoder)
            freeze_unused_vision_blocks(self.model, parameters, image_inputs)
        self.image_parameters = [p for p in parameters if p.requires_grad]
        self.data_collator.blank = blank if self.is_sharded else None

    def _check_engine(self) -> None:
        """Raise UserError where FSDP or DeepSpeed would not shard, or would train wrongly."""
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(
                "args.fsdp is set, but the processes compute on CPUs, where accelerate would copy"
                " the model to each of them instead of sharding it; remove args.fsdp, or run on"
                " accelerators"
            )
        if self.is_deepspeed_enabled:
            config = self.accelerator.deepspeed_plugin.deepspeed_config
            zero = config.get("zero_optimization", {})
            gathers = zero.get("stage3_gather_16bit_weights_on_model_save")
            if zero.get("stage") == 3 and not gathers:
                raise UserError(
                    "DeepSpeed would not gather the trained weights, so they could not be saved;"
                    " set zero_optimization.stage3_gather_16bit_weights_on_model_save to true in"
                    " its configuration"
                )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            raise UserError(
                "fsdp_config.activation_checkpointing would recompute layers without what shortcuts"
                " add to them, and give wrong gradients; remove it and set"
                " args.activation_checkpointing: true"
            )
        self._check_passes()
        if self.is_sharded and get_adapters(self.model):
            raise UserError(
                "adapters are not sharded: every process trains all of them; remove fsdp or"
                " deepspeed from args, because adapters are small"
            )

    def _check_passes(self) -> None:
        """Raise UserError where processes would wait for each other's passes of a sharded encoder.

        An encoder that reads images whole runs once for every size, and sizes differ by process.
        """
        data = self.train_dataset
        is_any_size = getattr(data.encoder.processor, "is_any_size", False)
        if not is_any_size or data.feature_cache is not None or not self.is_sharded:
            return
        kind = self.model.config.grid.kind
        if kind in FREE_SIZE_KINDS and not self._shards_gradients_alone:
            raise UserError(
                f"coarse is 'native', and the {kind} encoder runs once for every size of images,"
                " but where weights are sharded all processes must run it equally often; remove"
                " fsdp or deepspeed from args, freeze vision and set feature_cache, or use coarse:"
                " squash"
            )

    @property
    def _shards_gradients_alone(self) -> bool:
        """Whether DeepSpeed leaves every process all weights (stages 1 and 2)."""
        if not self.is_deepspeed_enabled:
            return False
        config = self.accelerator.deepspeed_plugin.deepspeed_config
        return config.get("zero_optimization", {}).get("stage", 0) < 3

    @property
    def num_records_seen(self) -> int:
        """Records seen up to the present step, over all processes."""
        return (self.state.global_step + 1) * self.batch_facts["global_batch"]

    def train_from(self, checkpoint: Path | None) -> None:
        """Train from the beginning, or continue a complete checkpoint.

        Args:
            checkpoint: The checkpoint's folder, None for the beginning.

        Raises:
            UserError: If the batches differ from those of the checkpoint, or the disk is too small.
            TrainingInterrupted: If SIGTERM has ended training, after a checkpoint is written.
            KeyboardInterrupt: The same for Ctrl-C.
        """
        if checkpoint is not None:
            self.check_continues(checkpoint)
            if isinstance(self.train_dataset, Stream):
                # The stream passes over what was seen without opening it.
                self.args.ignore_data_skip = True
                steps = int(checkpoint.name.rpartition("-")[2])
                self.train_dataset.start = steps * self.args.gradient_accumulation_steps
        check_disk_space(Path(self.args.output_dir), self._estimate_disk_bytes())
        try:
            with reach_without_images(self.model, self.image_parameters):
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.stop_signals.close()
        self.stop_signals.raise_received(self.stage.name, self.state, self.args.output_dir)

    def _estimate_disk_bytes(self) -> int:
        """Bytes of the stage's result and, where checkpoints are written, of one of them."""
        saved = self.model.fusion if self.model.saves_fusion_only else self.model
        weights = sum(p.numel() * p.element_size() for p in saved.parameters())
        if self.args.save_strategy == "no":
            return weights
        if self.args.save_only_model:
            return 2 * weights
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        optimizer_state = 2 * 4 * trained  # Adam's two moments, in single precision
        return 2 * weights + optimizer_state

    # Data

    def _get_train_sampler(self, train_dataset=None):
        """The Trainer's order, or one that groups and mixes records by the stage's settings."""
        data = self.train_dataset
        if not (self.stage.group or self.stage.pack or self.mixture):
            if self.args.train_sampling_strategy != "group_by_length" or not has_length(data):
                return super()._get_train_sampler(train_dataset)
            # The Trainer's own way to these lengths opens every image.
            num_records = self.args.train_batch_size * self.args.gradient_accumulation_steps
            return HfLengthGroupedSampler(num_records, lengths=data.lengths)
        if self.stage.group:
            lengths = data.lengths
            image_tokens = data.num_image_tokens
        else:
            lengths = [0] * len(data)
            image_tokens = lengths
        return LengthGroupedSampler(
            lengths,
            image_tokens,
            self.batch_facts["global_batch"],
            seed=self.args.data_seed,
            grouped=self.stage.group,
            mixture=self.mixture,
        )

    def get_train_dataloader(self):
        """The Trainer's DataLoader; a stream divides itself between processes."""
        data = self.train_dataset
        if not isinstance(data, Stream):
            return super().get_train_dataloader()
        # Without its own generator it would draw from the model's.
        generator = torch.Generator().manual_seed(self.args.data_seed)
        return DataLoader(
            data,
            data.batch,
            collate_fn=self.data_collator,
            generator=generator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The Trainer's; raises the error of a record that a worker process could not read."""
        return super().get_batch_samples(raise_errors(epoch_iterator), num_batches, device)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """The Trainer's; raises the error of a record that a worker process could not read."""
        inputs = next(raise_errors([inputs]))
        return super().prediction_step(model, inputs, *args, **kwargs)

    # Optimizer

    def create_optimizer(self, model=None):
        """The usual optimizer, its groups divided by part so that each has its own rate."""
        optimizer = super().create_optimizer(model)
        names = get_part_names(self.model, self.stage)
        decay_names = set(self.get_decay_parameter_names(self.model))
        decayed = {id(p) for name, p in self.model.named_parameters() if name in decay_names}
        groups = []
        for group in optimizer.param_groups:
            for part in dict.fromkeys(names[id(p)] for p in group["params"]):
                parameters = [p for p in group["params"] if names[id(p)] == part]
                decay = group["weight_decay"]
                if id(parameters[0]) in decayed:
                    decay = self.stage.weight_decay.get(part, decay)
                part_group = {
                    "params": parameters,
                    "lr": self.stage.lr.get(part, group["lr"]),
                    "weight_decay": decay,
                    "part": part,
                }
                groups.append({**group, **part_group})
        optimizer.param_groups = groups
        return optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """Names of matrices: weight decay spares biases, norms and the gates."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("fusion.gates")]

    # Steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch: counts tokens, and measures shortcuts where the step is logged.

        Raises:
            UserError: If no token of the step has a label, or if too many records are broken.
            LossNotFinite: If the loss is not finite.
        """
        step = self.state.global_step + 1
        if num_items_in_batch is not None and num_items_in_batch.max() == 0:
            raise UserError(
                f"step {step} has no token to train on: all its labels are masked; check template"
                " and data"
            )
        self._record_broken(inputs.pop("broken", ()))
        num_image_tokens = self._count_tokens(inputs)
        is_logged = step % self.state.logging_steps == 0 or step in (1, self.state.max_steps)
        with self.monitor.observe(is_logged):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if is_logged and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            scale = scaler.get_scale() if scaler is not None else 1.0
            self.monitor.record_gradients(bool(num_image_tokens), scale)
        if not math.isfinite(loss):
            raise LossNotFinite(
                f"step {step} has the loss {loss.item()}, so training cannot go on; lower the"
                " learning rate, warm it up, or clip gradients (args: learning_rate, warmup_steps,"
                " max_grad_norm)"
            )
        return loss

    def _count_tokens(self, inputs) -> torch.Tensor:
        """Add a micro-batch to the log; returns its number of image tokens."""
        input_ids = inputs["input_ids"]
        num_image_tokens = (input_ids == self.model.config.image_token_id).sum()
        mask = inputs.get("attention_mask")
        if mask is None:
            # Packed rows have no mask; a padding token with a label is an end token.
            is_padding = input_ids == self.data_collator.pad_token_id
            mask = (inputs["labels"] != IGNORED) | ~is_padding
        self.stage_log.count(mask.sum(), num_image_tokens)
        return num_image_tokens

    def _record_broken(self, errors) -> None:
        """Write broken records to the stage's file, unless this run has named them already.

        Args:
            errors: Errors of this micro-batch's broken records.

        Raises:
            UserError: If they are more than `max_broken` allows.
        """
        if not errors:
            return
        file = Path(self.args.output_dir) / SKIPPED
        known = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()
        lines = dict.fromkeys(" ".join(str(error).split()) for error in errors)
        new = [line for line in lines if line not in known]
        if not new:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as skipped:
            skipped.write("".join(f"{line}\n" for line in new))
        is_stream = isinstance(self.train_dataset, Stream)
        total = self.num_records_seen if is_stream else len(self.train_dataset.examples)
        num_broken = len(known) + len(new)
        fraction = max(source.max_broken for source in self.stage.data)
        if num_broken > max(MIN_BROKEN, fraction * total):
            raise UserError(
                f"step {self.state.global_step + 1}: {num_broken} of {total:,} records were left"
                f" out as broken, more than max_broken={fraction} allows; {file} names them, the"
                f" last: {new[-1]}; repair them, or raise max_broken"
            )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The model's loss, with the gate penalty; frozen parts stay in evaluation mode."""
        # The Trainer has just put the whole model into training mode.
        for module, part in self.frozen_modules:
            # Gradients pass through a frozen language model: where checkpointing is on, its layers
            # must still be recomputed.
            checkpoints = getattr(module, "gradient_checkpointing", False)
            module.training = part == "language" and checkpoints
        inputs = {**inputs, "use_cache": False}
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        loss = result[0] if return_outputs else result
        if self.stage.gate_penalty:
            loss = loss + self.stage.gate_penalty * self.model.fusion.gates.abs().sum()
        return (loss, result[1]) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Log the Trainer's figures and those of the shortcuts."""
        if "loss" in logs:
            self.stage_log.shortcuts = self.monitor.get_statistics()
            if "fusion" in self.stage.train:
                self.monitor.watch(logs.get("grad_norm"))
            for statistics in self.stage_log.shortcuts:
                prefix = f"shortcuts/{statistics['number']}_into_layer_{statistics['layer']}"
                for name in ("grad_norm", "ratio"):
                    if name in statistics:
                        logs[f"{prefix}/{name}"] = statistics[name]
            logs |= self.stage_log.compute_speed()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        """Evaluate without a change to the random numbers that training goes on with."""
        python_state = random.getstate()
        numpy_state = np.random.get_state()
        with torch.random.fork_rng():
            metrics = super().evaluate(*args, **kwargs)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        return metrics

    def floating_point_ops(self, inputs) -> int:
        """Nothing: the Trainer's estimate ignores images and walks all parameters at every step."""
        return 0
