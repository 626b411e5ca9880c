"""TRL's DPOTrainer and GRPOTrainer train built and upgraded models with their images."""

import copy
import math

import pytest
import torch
from helpers.trl_runs import KINDS, QUICK, build_for_trl, make_records

from sparsecut import load
from sparsecut.adapters import add_adapters
from sparsecut.building import save
from sparsecut.config.recipe import Lora

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")
FIELDS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images")


def make_dpo(model, processor, folder, **settings):
    return trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(folder), learning_rate=1e-2, **QUICK),
        train_dataset=make_records("preference"),
        processing_class=processor,
        **settings,
    )


def give_references(how: str, model, processor, folder):
    """(model, processor, settings) of DPOTrainer for a way to name the reference."""
    if how == "copy":
        return model, processor, {"ref_model": copy.deepcopy(model)}
    if how == "adapter":
        settings = peft.LoraConfig(target_modules="all-linear", modules_to_save=["fusion"])
        return model, processor, {"peft_config": settings}
    save(model, processor, folder)
    return (*load(folder), {}) if how == "loaded" else (str(folder), None, {})


@pytest.mark.parametrize("how", ["copy", "adapter", "loaded", "path"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_dpo_is_the_policy_at_the_start(kind, how, tmp_path):
    start, processor = build_for_trl(kind)
    model, processor, settings = give_references(how, start, processor, tmp_path / "model")
    expected = {name: value.clone() for name, value in start.state_dict().items()}
    trainer = make_dpo(model, processor, tmp_path / "out", **settings)
    assert abs(trainer.train().training_loss - math.log(2)) < 1e-6
    if how == "adapter":
        assert trainer.ref_model is None
        trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert any("modules_to_save" in name for name in trained)
        assert not any("fusion" in name and "lora" in name for name in trained)
        return
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for name, value in trainer.model.fusion.named_parameters():
        assert not torch.equal(value, expected[f"fusion.{name}"]), name


def test_the_reference_of_a_loaded_model_has_its_adapters(tmp_path):
    start, processor = build_for_trl("built")
    add_adapters(start, ("language:lora",), Lora(r=2, alpha=4, targets=("q_proj",)))
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save(start, processor, tmp_path / "model")
    trainer = make_dpo(*load(tmp_path / "model"), tmp_path / "out")
    assert abs(trainer.train().training_loss - math.log(2)) < 1e-6
    for name, value in trainer.ref_model.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name
    trainer.save_model()
    model, _ = load(tmp_path / "out")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def count_letters(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def make_grpo(model, processor, folder, counts=(1, 2, 0, 1), **settings):
    quick = QUICK | {"per_device_train_batch_size": 4, "learning_rate": 1e-2}
    args = trl.GRPOConfig(
        output_dir=str(folder), num_generations=2, max_completion_length=5, **quick | settings
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=count_letters,
        args=args,
        train_dataset=make_records("prompt", counts),
        processing_class=processor,
    )


def join_views(processor):
    """GRPOTrainer knows no `fine_pixel_values`."""
    processor.join_views = True
    return processor


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_scores_what_it_generates_as_a_fresh_pass_does(kind, tmp_path):
    model, processor = build_for_trl(kind)
    trainer = make_grpo(model, join_views(processor), tmp_path)
    records = [trainer.train_dataset[i] for i in (0, 0, 1, 1)]
    scored = trainer._generate_and_score_completions(records)
    ids = torch.cat([scored["prompt_ids"], scored["completion_ids"]], dim=1)
    mask = torch.cat([scored["prompt_mask"], scored["completion_mask"]], dim=1)
    fields = {name: scored[name] for name in FIELDS if name in scored}
    assert fields["num_images"] == [1, 1, 2, 2]
    keep = scored["completion_ids"].shape[1]
    model.eval()
    with torch.no_grad():
        parts, *_ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, keep, batch_size=2, **fields
        )
        fields.pop("num_images")
        logits = model(input_ids=ids, attention_mask=mask, **fields).logits
        with model.fusion.switched_off(*range(1, len(model.plan.shortcuts))):
            without = model(input_ids=ids, attention_mask=mask, **fields).logits
    whole = logits[:, -keep - 1 : -1].log_softmax(-1)
    expected = whole.gather(-1, scored["completion_ids"].unsqueeze(-1)).squeeze(-1)
    is_written = scored["completion_mask"] > 0
    torch.testing.assert_close(parts[is_written], expected[is_written], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[:, -keep:], without[:, -keep:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_grpo_trains_the_fusion_with_records_of_all_kinds(kind, tmp_path):
    model, processor = build_for_trl(kind)
    before = {name: value.clone() for name, value in model.fusion.named_parameters()}
    settings = {"steps_per_generation": 2, "gradient_accumulation_steps": 2}
    trainer = make_grpo(model, join_views(processor), tmp_path, **settings)
    torch.manual_seed(0)
    trainer.train()
    assert all(torch.isfinite(value).all() for value in model.parameters())
    assert any(not torch.equal(v, before[name]) for name, v in model.fusion.named_parameters())


def test_views_in_one_input_give_what_apart_they_give(tmp_path):
    model, processor = build_for_trl("llava")
    image, text = make_records("prompt", (1,))[0]["images"][0], "<image> what"
    apart = processor(images=[image], text=[text], return_tensors="pt")
    join_views(processor).save_pretrained(tmp_path)
    save(model, processor, tmp_path)
    model, processor = load(tmp_path)
    together = processor(images=[image], text=[text], return_tensors="pt")
    assert together["pixel_values"].shape == (1, 5, 3, 16, 16)
    short = {"max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        for call in (model, model.base_model, lambda **inputs: model.generate(**inputs, **short)):
            one, other = call(**together), call(**apart)
            one, other = (x if isinstance(x, torch.Tensor) else x[0] for x in (one, other))
            assert torch.equal(one, other)
