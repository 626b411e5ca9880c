"""One Hugging Face Trainer per stage, with what a stage adds: frozen parts, a learning rate per
part, loud failures.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..adapters import get_adapters, load_checkpoint, save_adapters, strip_adapters
from ..config.recipe import Stage
from ..data.dataset import blank_item, picture_inputs, raise_errors
from ..data.encoding import IGNORED
from ..data.packing import LengthGroupedSampler, PackedDataset, check_packing
from ..data.streaming import Stream
from ..modeling_upgraded import WEIGHTS
from ..schema import UserError
from .freezing import freeze_unused_vision_blocks, frozen_modules, part_names
from .preemption import SigtermCallback, TrainingInterrupted
from .progress import StageLog
from .run_dir import SKIPPED, check_continues, check_room, mark_whole, not_written
from .shortcut_stats import ShortcutMonitor

FEW = 10  # broken records that any stage may have


class StageTrainer(Trainer):
    """A Trainer for one stage: frozen parts stay in evaluation mode, parts have their own learning
    rates, bad losses stop it.
    """

    def __init__(self, *args, stage: Stage, log: StageLog, mixture=None, **kwargs):
        self.stop, self.mixture = SigtermCallback(), mixture
        super().__init__(*args, callbacks=[log, self.stop], **kwargs)
        self.stage, self.stage_log = stage, log
        self._check_sharding()
        if stage.loss_over == "batches":
            self.model_accepts_loss_kwargs = (
                False  # then the Trainer averages over micro-batches and processes
            )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.watch = ShortcutMonitor(
            self.model.fusion, stage.name, compiled=self.args.torch_compile
        )
        self.frozen = frozen_modules(self.model, stage)
        parts = self.model.parameter_groups()
        pictured = [*parts["vision"], *parts.get("projector", ())]
        data = self.train_dataset
        blank = blank_item(
            data.processor, template=data.template, states=data.states, views=data.views
        )
        if self.is_sharded and get_adapters(self.model):
            raise UserError(
                "adapters are trained whole on every process; remove fsdp or deepspeed from args,"
                " the adapters are small"
            )
        whole = not any(
            hasattr(p, "ds_id") for p in pictured
        )  # DeepSpeed may hold pieces from the start
        if whole and isinstance(data, PackedDataset):
            check_packing(self.model, self.data_collator, data)
        if whole and any(p.requires_grad for p in pictured):
            freeze_unused_vision_blocks(self.model, pictured, picture_inputs(blank, data.processor))
        self.pictured = [p for p in pictured if p.requires_grad]
        self.data_collator.blank = blank if self.is_sharded else None

    def _check_sharding(self) -> None:
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UserError(
                "args.fsdp is set, but the processes compute on CPUs, where accelerate would copy"
                " the model to each of them instead of sharding it; remove args.fsdp, or run on"
                " accelerators"
            )
        zero = (
            self.accelerator.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else {}
        )
        zero = zero.get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
            raise UserError(
                "DeepSpeed would not gather the weights that this stage has trained, so they could"
                " not be saved; set zero_optimization.stage3_gather_16bit_weights_on_model_save to"
                " true in its configuration"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.activation_checkpointing:
            raise UserError(
                "fsdp_config.activation_checkpointing would compute layers again without what"
                " shortcuts add to them, and give wrong gradients; remove it and set"
                " args.activation_checkpointing: true"
            )

    @property
    def num_seen(self) -> int:
        """Records seen so far, over all processes."""
        return (self.state.global_step + 1) * self.batch_facts["global_batch"]

    @property
    def is_sharded(self) -> bool:
        """Whether weights lie in pieces on several processes (FSDP, DeepSpeed)."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def batch_facts(self) -> dict[str, int]:
        """What a run must have in common with its continuation, for the batches to be the same."""
        args, processes = self.args, self.args.world_size
        return {
            "global_batch": (
                args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
            ),
            "processes": processes,
        }

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a whole checkpoint on if there is one; Stopped where SIGTERM has ended it,
        with a checkpoint written.
        """
        if checkpoint is not None:
            check_continues(checkpoint, self.batch_facts, self.stage.name)
            if isinstance(self.train_dataset, Stream):
                self.args.ignore_data_skip = (
                    True  # the stream passes over what was seen without opening it
                )
                steps = int(checkpoint.name.rpartition("-")[2])
                self.train_dataset.start = steps * self.args.gradient_accumulation_steps
        check_room(Path(self.args.output_dir), self._num_bytes(), self.stage.name)
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            self.stop.close()
        if self.stop.received:
            raise TrainingInterrupted(
                f"stage {self.stage.name}: stopped by SIGTERM after step {self.state.global_step}"
                f" of {self.state.max_steps}, which is kept in {self.args.output_dir}; go on with"
                " --resume"
            )

    def _get_train_sampler(self, train_dataset=None):
        """The Trainer's random order, or one with alike records in a step."""
        if not (self.stage.group or self.stage.pack or self.mixture):
            return super()._get_train_sampler(train_dataset)
        data, step = self.train_dataset, self.batch_facts["global_batch"]
        lengths, images = (
            (data.lengths, data.num_image_tokens) if self.stage.group else ([0] * len(data),) * 2
        )
        more = {"seed": self.args.data_seed, "grouped": self.stage.group, "mixture": self.mixture}
        return LengthGroupedSampler(lengths, images, step, **more)

    def get_train_dataloader(self):
        """The Trainer's; a stream divides itself between processes."""
        data = self.train_dataset
        if not isinstance(data, Stream):
            return super().get_train_dataloader()
        generator = torch.Generator().manual_seed(
            self.args.data_seed
        )  # or it would take random numbers of the model's
        workers = {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
        }
        return DataLoader(
            data, data.batch, collate_fn=self.data_collator, generator=generator, **workers
        )

    def create_optimizer(self, model=None):
        """The usual optimizer, its groups divided by part so that each takes its own learning
        rate.
        """
        optimizer = super().create_optimizer(model)
        names, groups = part_names(self.model, self.stage), []
        decaying = set(self.get_decay_parameter_names(self.model))
        decayed = {id(p) for name, p in self.model.named_parameters() if name in decaying}
        for group in optimizer.param_groups:
            for part in dict.fromkeys(names[id(p)] for p in group["params"]):
                parameters = [p for p in group["params"] if names[id(p)] == part]
                rate = self.stage.lr.get(part, group["lr"])
                decay = group["weight_decay"]
                if id(parameters[0]) in decayed:
                    decay = self.stage.weight_decay.get(part, decay)
                groups.append(
                    {**group, "params": parameters, "lr": rate, "weight_decay": decay, "part": part}
                )
        optimizer.param_groups = groups
        return optimizer

    def get_decay_parameter_names(self, model) -> list[str]:
        """Weight decay is for matrices: neither biases and norms nor the gates."""
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not name.endswith("fusion.gates")
        ]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The Trainer's; raises the error of a record that a worker process could not read."""
        return super().get_batch_samples(raise_errors(epoch_iterator), num_batches, device)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """The Trainer's; raises the error of a record that a worker process could not read."""
        inputs = next(raise_errors([inputs]))
        return super().prediction_step(model, inputs, *args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """A step that counts tokens and stops at a loss that is not a number or has nothing to
        learn.
        """
        if num_items_in_batch is not None and num_items_in_batch.max() == 0:
            raise UserError(
                f"{self._place()} has no token to learn: all its labels are masked; check template"
                " and data"
            )
        self._note_broken(inputs.pop("broken", ()))
        images = (inputs["input_ids"] == self.model.config.image_token_id).sum()
        # Packed rows have no mask; a padding token that is learned is an end token.
        told = (inputs["labels"] != IGNORED) | (
            inputs["input_ids"] != self.data_collator.pad_token_id
        )
        self.stage_log.count(inputs.get("attention_mask", told).sum(), images)
        steps = self.state.global_step + 1
        logged = steps % self.state.logging_steps == 0 or steps in (1, self.state.max_steps)
        with self.watch.watching(logged):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if logged and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.watch.take_gradients(
                bool(images), scaler.get_scale() if scaler is not None else 1.0
            )
        if not math.isfinite(loss):
            raise UserError(
                f"{self._place()} has the loss {loss.item()}, so training cannot go on; lower the"
                " learning rate, warm it up, or clip gradients (args: learning_rate, warmup_steps,"
                " max_grad_norm)"
            )
        return loss

    def _note_broken(self, errors) -> None:
        """Count and name broken records, of all processes and of this run's beginning; ValueError
        where they are more than their share.
        """
        if not errors:
            return
        file = Path(self.args.output_dir) / SKIPPED
        known = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else set()
        new = [
            one
            for one in dict.fromkeys(" ".join(str(error).split()) for error in errors)
            if one not in known
        ]
        if not new:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write("".join(f"{sentence}\n" for sentence in new))
        data, num = self.train_dataset, len(known) + len(new)
        seen = self.num_seen if isinstance(data, Stream) else len(data.examples)
        share = max(source.max_broken for source in self.stage.data)
        if num > max(FEW, share * seen):
            raise UserError(
                f"{self._place()}: {num} of {seen:,} records were left out as broken, more than"
                f" max_broken={share} allows; they are named in {file}, the last: {new[-1]}; mend"
                " them, or raise max_broken"
            )

    def log(self, logs, start_time=None):
        """The Trainer's figures and those of the shortcuts, to log.jsonl and wherever `report_to`
        says.
        """
        if "loss" in logs:
            self.stage_log.shortcuts = self.watch.figures()
            for of_one in self.stage_log.shortcuts:
                for name in ("grad_norm", "ratio"):
                    if name in of_one:
                        logs[
                            f"shortcuts/{of_one['number']}_into_layer_{of_one['layer']}/{name}"
                        ] = of_one[name]
            logs |= self.stage_log.figures()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs):
        """As the Trainer, but the random numbers that training goes on with are the same as without
        it.
        """
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng():
            metrics = super().evaluate(*args, **kwargs)
        random.setstate(states[0])
        np.random.set_state(states[1])
        return metrics

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """The model's loss per learned token of the global batch."""
        for (
            module,
            part,
        ) in self.frozen:  # the Trainer has just put the whole model into training mode
            # Gradients pass through a frozen language model: where checkpointing is on, its layers
            # must still be recomputed.
            module.training = part == "language" and getattr(
                module, "gradient_checkpointing", False
            )
        inputs = {**inputs, "use_cache": False}  # a cache of keys and values is of no use here
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if "pixel_values" not in inputs and self.pictured:
            # As in the model for fusion: a batch without pictures must still give every trained
            # part a gradient.
            zero = 0.0 * sum(p.sum() for p in self.pictured)
            loss = (loss[0] + zero, loss[1]) if return_outputs else loss + zero
        if self.stage.gate_penalty:
            extra = self.stage.gate_penalty * self.model.fusion.gates.abs().sum()
            loss = (loss[0] + extra, loss[1]) if return_outputs else loss + extra
        return loss

    def _save_checkpoint(self, model, trial):
        """As the Trainer, but marked once it is whole, and only then are old ones removed."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_whole(folder, self.batch_facts)
                rotate_checkpoints(str(folder.parent), limit)
        except Exception as error:  # safetensors, torch and the file system each have their own
            raise not_written(error, folder, self.stage.name) from error
        finally:
            self.args.save_total_limit = limit

    def _save(self, output_dir=None, state_dict=None):
        """As the Trainer, but of an upgraded model whose base is untouched only the shortcuts, and
        adapters in files of their own.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self.model.saves_fusion_only:
            if get_adapters(self.model):
                state_dict = strip_adapters(state_dict or self.model.state_dict())
            super()._save(str(folder), state_dict)
        elif self.args.should_save:
            self.model.save_fusion(folder, state_dict)
        if self.args.should_save:
            save_adapters(self.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As the Trainer, and also from a checkpoint of shortcuts alone, or with adapters."""
        folder = Path(resume_from_checkpoint)
        if self.is_sharded or not ((folder / WEIGHTS).is_file() or get_adapters(self.model)):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (folder / WEIGHTS).is_file():
            self.model.fusion.load_state_dict(load_file(folder / WEIGHTS))
        load_checkpoint(self.model, folder)

    def _num_bytes(self) -> int:
        """What the disk must hold: the stage's result and, where checkpoints are written, one of
        them.
        """
        saved = self.model.fusion if self.model.saves_fusion_only else self.model
        weights = sum(p.numel() * p.element_size() for p in saved.parameters())
        if self.args.save_strategy == "no":
            return weights
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        states = (
            0 if self.args.save_only_model else 2 * 4 * trained
        )  # Adam's two moments in single precision
        return 2 * weights + states

    def floating_point_ops(self, inputs) -> int:
        """Not counted here: the Trainer's rule of thumb knows no pictures and walks all parameters
        at every step.
        """
        return 0

    def _place(self) -> str:
        return f"stage {self.stage.name}: step {self.state.global_step + 1}"
