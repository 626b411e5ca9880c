"""What makes training quicker: shapes that repeat, kernels of others, an encoder that is run no
further and kept no longer than needed.
"""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from helpers.example_bases import build_example_base
from helpers.runs import run, stage, trainer_for, write_records
from helpers.tiny import tiny_model, tiny_vision

from sparsecut import upgrade
from sparsecut.data.collator import Collator
from sparsecut.data.encoding import example_encoder
from sparsecut.hooks import CHECKPOINTING
from sparsecut.training.freezing import apply_liger, freeze


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their images."""
    write_records(tmp_path)
    return tmp_path


def test_padded_batches_have_few_lengths_and_the_same_loss(folder):
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder)
    items = [trainer.train_dataset[i] for i in range(12)]
    lengths, losses = set(), []
    for pad_to in (None, 32):
        collator = Collator(example_encoder(processor), pad_to=pad_to)
        batches = [collator(items[at : at + 3]) for at in range(0, 12, 3)]
        lengths = {batch["input_ids"].shape[1] for batch in batches}
        losses.append([trainer.compute_loss(model, batch).item() for batch in batches])
    assert lengths == {32} and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_nothing_of_a_frozen_encoder_waits_for_the_backward_pass(folder):
    """What autograd keeps is of the fusion and the decoder: its size does not hang on the encoder's
    depth.
    """
    assert count_saved_values(folder, 6) == count_saved_values(folder, 12) > 0


def test_checkpointing_does_not_wake_a_frozen_encoder(folder):
    """transformers has the encoder's embeddings ask for a gradient, too; for a trained encoder
    that is as it was.
    """
    frozen = [count_saved_values(folder, depth, tap=depth, checkpointing=True) for depth in (6, 12)]
    assert frozen[0] == frozen[1] > 0
    trained = [
        count_saved_values(folder, depth, tap=depth, checkpointing=True, vision=True)
        for depth in (6, 12)
    ]
    assert frozen[0] < trained[0] < trained[1]


PARTS = [["fusion"], ["fusion", "vision"], ["vision"], ["language"]]


@pytest.mark.parametrize(
    ("kind", "parts"),
    [("llava", ["projector"]), *itertools.product(["built", "llava", "qwen"], PARTS)],
)
def test_checkpointing_changes_no_gradient(folder, kind, parts):
    same_gradients(
        gradients(folder, kind, parts), gradients(folder, kind, parts, {"use_reentrant": False})
    )


@pytest.mark.parametrize("kind", ["built", "llava"])
def test_a_partly_trained_encoder_gets_its_gradients_from_reentrant_checkpointing_too(folder, kind):
    """Its blocks get none unless their input asks for one, which embeddings that rest must do for
    them.
    """
    found = [
        gradients(folder, kind, ["vision"], how, only="layers.0.mlp")
        for how in (None, {"use_reentrant": True})
    ]
    same_gradients(*found)


def gradients(
    folder, kind: str, parts: list[str], checkpointing: dict | None = None, only: str = ""
) -> dict:
    """Gradients of a batch by name, of those parameters of the parts whose name has `only` in
    it.
    """
    if kind == "built":
        model, processor = tiny_model()
    else:
        base, processor = build_example_base(kind)
        model, processor = upgrade(base, processor=processor)
    torch.manual_seed(0)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    # The recipe of a base alone may train its projector; either way the encoder is frozen.
    trainer = trainer_for(
        model, processor, folder, train=["fusion"] if parts == ["projector"] else parts
    )
    freeze(model, parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and only in name)
    if checkpointing is not None:
        getattr(model, f"{CHECKPOINTING}_enable")(checkpointing)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.compute_loss(model.train(), batch).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(plain: dict, checkpointed: dict) -> None:
    """The same parameters have a gradient, and the same one."""
    assert plain.keys() == checkpointed.keys() and len(plain) > 3
    for name, gradient in plain.items():
        assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name


def count_saved_values(
    folder, depth: int, tap: int = 2, checkpointing: bool = False, vision: bool = False
) -> int:
    """How many values autograd keeps of a step with an encoder of so many blocks, run up to the
    tap.
    """
    model, processor = tiny_model({"method": "llava", "tap": tap}, vision=tiny_vision(depth))
    trainer = trainer_for(
        model, processor, folder, **({"train": ["fusion", "vision"]} if vision else {})
    )
    if checkpointing:
        getattr(model.train(), f"{CHECKPOINTING}_enable")()
    batch, sizes, ran = trainer.data_collator([trainer.train_dataset[i] for i in range(3)]), [], []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    for number, layer in enumerate(model.vision_tower.encoder.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.compute_loss(model, batch)
    assert max(ran) == tap - 1  # tap 2 is what the second block gives
    return sum(sizes)


def test_liger_s_kernels_go_into_the_language_model(folder, monkeypatch):
    """Its package needs a GPU, so a stand-in notes its calls; transformers alone would ask
    for the whole model's type.
    """
    calls = []
    package, inside, patch = (
        ModuleType(f"liger_kernel{name}")
        for name in ("", ".transformers", ".transformers.monkey_patch")
    )
    inside._apply_liger_kernel_to_instance = lambda model, **settings: calls.append(
        (model, settings)
    )
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (package, inside, patch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model, _ = tiny_model()
    apply_liger(model, {"rope": False})
    assert calls == [(model.language_model, {"fused_linear_cross_entropy": False, "rope": False})]
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}
    with pytest.raises(ValueError, match=r"llama.*qwen2"):
        apply_liger(model, None)


def test_liger_without_its_package_is_refused(folder):
    with pytest.raises(ValueError, match="liger-kernel"):
        run(folder, stage(folder, args={"use_liger_kernel": True}))
