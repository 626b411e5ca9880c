"""TRL's SFTTrainer trains built and upgraded models as our own training does."""

import copy

import pytest
import torch
from helpers.trl_runs import KINDS, QUICK, build_for_trl, encode_as_we_do, make_records
from transformers import AutoModelForImageTextToText

from sparsecut import load
from sparsecut.chat_templates.answer_marks import mark_answers

trl = pytest.importorskip("trl")


def make_trainer(model, processor, records, folder, **settings):
    args = trl.SFTConfig(output_dir=str(folder), **QUICK | settings)
    return trl.SFTTrainer(model=model, args=args, train_dataset=records, processing_class=processor)


def get_batch(trainer) -> dict:
    """The batch of all records, in their order."""
    return trainer.data_collator([trainer.train_dataset[i] for i in range(3)])


def forget(model):
    """A fresh copy of a model, as a trainer changes its forward."""
    return copy.deepcopy(model)


# TRL learns all that a template writes after an answer, as Qwen's line end: no completions there.
CASES = [(kind, "messages") for kind in KINDS] + [("built", "completion"), ("llava", "completion")]


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_a_batch_has_the_tokens_labels_and_loss_of_our_own_training(kind, form, tmp_path):
    model, processor = build_for_trl(kind)
    ours = encode_as_we_do(processor)
    processor = mark_answers(processor)
    with torch.no_grad():
        expected = forget(model)(**ours).loss
    only = {"assistant_only_loss": form == "messages"}
    trainer = make_trainer(model, processor, make_records(form), tmp_path, **only)
    batch = get_batch(trainer)
    assert batch.keys() == ours.keys()
    for name, value in ours.items():
        assert torch.equal(batch[name], value), name
    model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        with model.fusion.switched_off(*range(1, len(model.plan.shortcuts))):
            assert abs(trainer.compute_loss(model, dict(batch)) - loss) > 1e-3


@pytest.mark.parametrize("trained", ["fusion", "language"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_trainable_changes(kind, trained, tmp_path):
    model, processor = build_for_trl(kind)
    model.requires_grad_(False)
    for parameter in model.parameter_groups()[trained]:
        parameter.requires_grad_(True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = make_trainer(
        model, processor, make_records("completion"), tmp_path, learning_rate=1e-2
    )
    trainer.train()
    for name, value in model.named_parameters():
        is_changed = not torch.equal(value, before[name])
        assert is_changed == value.requires_grad, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_texts_trains_where_only_the_fusion_is_trained(kind, tmp_path):
    model, processor = build_for_trl(kind)
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    records = make_records("completion", (0, 0, 0, 1)).select(range(3))
    trainer = make_trainer(model, processor, records, tmp_path, gradient_checkpointing=False)
    batch = get_batch(trainer)
    assert "pixel_values" not in batch
    loss = trainer.compute_loss(model.train(), batch)
    loss.backward()
    assert all(not p.grad.any() for p in model.fusion.parameters())


@pytest.mark.parametrize("form", ["messages", "completion"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_length_that_cuts_image_tokens_is_refused(kind, form, tmp_path):
    model, processor = build_for_trl(kind)
    trainer = make_trainer(model, processor, make_records(form), tmp_path, max_length=5)
    with pytest.raises(ValueError, match="image"):
        trainer.train()


def get_logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_continued_and_its_model_loaded_everywhere(kind, tmp_path):
    settings = {"learning_rate": 1e-2, "max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    start, processor = build_for_trl(kind)
    records = make_records("completion")
    whole = make_trainer(forget(start), processor, records, tmp_path / "whole", **settings)
    whole.train()
    whole.save_model()
    batch = get_batch(whole)
    expected = get_logits(whole.model, batch)

    rest = make_trainer(forget(start), processor, records, tmp_path / "rest", **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert torch.equal(get_logits(rest.model, batch), expected)

    model, _ = load(tmp_path / "whole")
    assert torch.equal(get_logits(model, batch), expected)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert torch.equal(get_logits(auto, batch), expected)
    from_path = make_trainer(str(tmp_path / "whole"), None, records, tmp_path / "more")
    for name, value in get_batch(from_path).items():
        assert torch.equal(value, batch[name]), name
    assert torch.equal(get_logits(from_path.model, batch), expected)
