"""TRL's trainers with images of any size: SFT and DPO train, GRPO is refused before it learns."""

import copy
import math

import pytest
from datasets import Dataset
from helpers.any_size import LIMITS, draw_image
from helpers.bases import randomize_fusion
from helpers.tiny import tiny_model
from helpers.trl_runs import ANSWER, QUICK, answer, ask

from sparsecut.schema import UserError

trl = pytest.importorskip("trl")
IMAGES = [[(10, 40)], [(60, 16), (16, 16)], []]  # heights and widths of each record


@pytest.fixture
def parts():
    """(model, processor), the shortcuts with an effect."""
    model, processor = tiny_model(**LIMITS)
    return randomize_fusion(model), processor


def make_records(**texts) -> Dataset:
    records = []
    for sizes in IMAGES:
        images = [draw_image(*size) for size in sizes]
        records.append({"images": images, "prompt": ask(len(images)), **texts})
    return Dataset.from_list(records)


def make_arguments(kind, folder, **settings):
    return kind(output_dir=str(folder), learning_rate=1e-2, **QUICK | settings)


def test_sft_gives_every_image_its_grid(parts, tmp_path):
    model, processor = parts
    trainer = trl.SFTTrainer(
        model=model,
        args=make_arguments(trl.SFTConfig, tmp_path),
        train_dataset=make_records(completion=answer(ANSWER)),
        processing_class=processor,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    expected = [list(processor.choose_grid(*size)) for sizes in IMAGES for size in sizes]
    assert batch["image_grids"].tolist() == expected
    before = model.fusion.paths[1].linear_2.weight.clone()
    trainer.train()
    assert (model.fusion.paths[1].linear_2.weight != before).any()


def test_dpo_starts_where_policy_and_reference_are_equal(parts, tmp_path):
    model, processor = parts
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=make_arguments(trl.DPOConfig, tmp_path),
        train_dataset=make_records(chosen=answer(ANSWER), rejected=answer("no dog")),
        processing_class=processor,
    )
    assert abs(trainer.train().training_loss - math.log(2)) < 1e-6


def test_grpo_which_passes_no_grids_is_refused(parts, tmp_path):
    model, processor = parts
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 4}
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        args=make_arguments(trl.GRPOConfig, tmp_path, **settings),
        train_dataset=make_records().select([1, 1]),
        processing_class=processor,
    )
    with pytest.raises(UserError, match="image_grids"):
        trainer.train()
