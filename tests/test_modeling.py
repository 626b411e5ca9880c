"""The model as a Hugging Face model: equal to LLaVA under the `llava` plan, and everything a user
of theirs expects.
"""

import pytest
import torch
from helpers import checks
from helpers.checks import IMAGE, batch, fusion_gradients
from helpers.families import family_language, family_vision
from helpers.tiny import tiny_model, tiny_vision
from transformers import CLIPConfig, CLIPModel, LlavaConfig, LlavaForConditionalGeneration

from sparsecut import build
from sparsecut.hooks import CHECKPOINTING
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def model():
    return checks.join()


def with_labels(inputs):
    """The batch and its labels, image tokens and padding left out."""
    out = (inputs["input_ids"] == IMAGE) | (inputs["attention_mask"] == 0)
    return inputs | {"labels": inputs["input_ids"].masked_fill(out, -100)}


@pytest.mark.parametrize(
    ("family", "select"), [("clip_vision_model", "default"), ("siglip_vision_model", "full")]
)
def test_the_llava_plan_is_hugging_face_llava(family, select):
    ours = checks.join(vision=family, plan="llava")
    config = LlavaConfig(
        vision_config=ours.config.vision_config,
        text_config=ours.config.text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy=select,
        image_seq_length=4,
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(ours.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(ours.language_model.model.state_dict())
    theirs.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    theirs.model.multi_modal_projector.load_state_dict(ours.fusion.paths[0].state_dict())
    inputs = with_labels(
        batch(ours, [[5, IMAGE, 6, 7, 8], [9, IMAGE, IMAGE, 10], [20, 21, 22]], side="right")
    )
    expected = theirs(**inputs | {"pixel_values": inputs["pixel_values"][:, 0]})
    found = ours(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_to_keep_are_the_last_logits(model):
    inputs = batch(model)
    logits = model(**inputs).logits
    for keep in (1, 3, torch.tensor([0, 4])):
        kept = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        torch.testing.assert_close(
            model(**inputs, logits_to_keep=keep).logits, kept, atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_hidden_states_come_before_the_additions(model):
    inputs, seen = batch(model), []
    layers = model.language_model.model.layers
    handles = [
        layer.register_forward_hook(lambda m, args, out: seen.append(out)) for layer in layers
    ]
    states = model(**inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert len(states) == 5
    assert all(torch.equal(state, out) for state, out in zip(states[1:-1], seen, strict=False))


@torch.no_grad()
def test_outputs_are_tuples_on_request_and_name_the_image_features(model):
    inputs = batch(model)
    out = model(**inputs)
    assert torch.equal(model(**inputs, return_dict=False)[0], out.logits)
    features = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(out.image_hidden_states, torch.cat(features.pooler_output))
    assert [len(layer) for layer in features.deepstack_features] == [2, 2]


@torch.no_grad()
def test_the_loss_looks_one_token_ahead_and_ignores_minus_100(model):
    inputs = with_labels(batch(model, side="right"))
    out = model(**inputs)
    pairs = [
        (out.logits[b, i], t)
        for b, row in enumerate(inputs["labels"])
        for i, t in enumerate(row[1:])
        if t != -100
    ]
    expected = torch.stack([-logits.log_softmax(-1)[t] for logits, t in pairs]).mean()
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    summed = model(**inputs, num_items_in_batch=torch.tensor(2 * len(pairs))).loss
    torch.testing.assert_close(summed, expected / 2, atol=1e-6, rtol=1e-6)


def test_parts_are_the_whole_model_under_the_names_a_recipe_trains(model):
    parts = model.parameter_groups()
    assert list(parts) == ["vision", "fusion", "language", "head"]
    together = [p for name in ("vision", "fusion", "language") for p in parts[name]]
    assert {id(p) for p in together} == {id(p) for p in model.parameters()}
    assert [id(p) for p in parts["head"]] == [id(model.get_output_embeddings().weight)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_pixels_take_the_type_of_the_model(dtype):
    model = checks.join().to(dtype)
    logits = model(**batch(model)).logits
    assert batch(model)["pixel_values"].dtype == torch.float32 and logits.dtype == dtype
    reference = checks.join()(**batch(model)).logits.to(dtype)
    torch.testing.assert_close(
        logits, reference, atol=0.5 if dtype == torch.bfloat16 else 1e-4, rtol=0.1
    )


@torch.no_grad()
def test_a_longer_vocabulary_changes_no_old_logit(model):
    model, inputs = checks.join(), batch(model)
    before = model(**inputs).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.text_config.vocab_size == model.language_model.config.vocab_size == 70
    assert torch.equal(model(**inputs).logits[..., :64], before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_every_part_the_same_gradient(reentrant):
    model = checks.join().train()
    model.vision_tower.requires_grad_(False)
    inputs = batch(model, side="right")
    fusion_gradients(model, inputs)
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": reentrant})
    runs = []
    handle = model.language_model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    fusion_gradients(model, inputs)
    handle.remove()
    assert len(runs) == 2, "the layer is computed again in the backward pass"
    checks.assert_same(
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected
    )


@torch.no_grad()
def test_a_forward_pass_is_one_graph():
    torch._dynamo.reset()
    vision = family_vision("clip_vision_model", num_hidden_layers=2)
    language = family_language("llama", num_hidden_layers=2)
    model = checks.join(vision, language)
    inputs = batch(model, side="right")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, model(**inputs, use_cache=False).logits)


def test_joining_keeps_how_a_language_model_computes_attention_and_experts():
    language = family_language("mixtral")
    before = language.config._attn_implementation, language.config._experts_implementation
    model = checks.join(language=language)
    assert None not in before
    assert before == (
        model.language_model.config._attn_implementation,
        model.language_model.config._experts_implementation,
    )


@torch.no_grad()
def test_build_takes_a_loaded_two_tower_model(tiny):
    _, processor = tiny
    vision, language = tiny_vision(), tiny[0].language_model
    both = CLIPModel(
        CLIPConfig(vision_config=vision.config.to_dict(), text_config={"num_hidden_layers": 1})
    ).eval()
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    model, _ = build(both, language, "llava", **parts)
    assert model.vision_tower is both.vision_model
    pixels = torch.randn(1, 1, 3, 16, 16)
    assert len(model.get_image_features(pixels).pooler_output[0]) == 4


def test_a_configuration_may_be_derived_from_ours(tiny):
    config = tiny[0].config

    class Derived(type(config)):
        pass

    values = {name: getattr(config, name) for name in ("vision_config", "text_config", "plan")}
    assert Derived(**values).get_plan() == config.get_plan()


def test_build_refuses_before_it_changes_anything(tiny):
    _, processor = tiny
    vision, language = tiny_vision(), tiny[0].language_model
    before = language.get_input_embeddings().num_embeddings
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    with pytest.raises(UserError, match=r"layer 4.*layers 0 to 3"):
        build(
            vision,
            language,
            {"shortcuts": [{"taps": [1], "layer": 0}, {"taps": [1], "layer": 4}]},
            **parts,
        )
    with pytest.raises(UserError, match="mix='base'"):  # the plan of an upgraded model
        build(
            vision,
            language,
            {"shortcuts": [{"taps": [], "layer": 0, "mix": "base"}, {"taps": [1], "layer": 1}]},
            **parts,
        )
    with pytest.raises(UserError, match="tokenizer="):
        build(vision, language, "llava", image_processor=processor.image_processor)
    assert language.get_input_embeddings().num_embeddings == before
    assert not any(block._forward_hooks for block in vision.encoder.layers)


@torch.no_grad()
def test_building_changes_no_weight_and_no_setting_of_its_parts():
    vision, language = tiny_vision(), family_language("llama")
    kept = [p.clone() for p in [*vision.parameters(), *language.parameters()]]
    language.generation_config.suppress_tokens = [3]
    model, _ = tiny_model("sparsecut", vision=vision, language=language)
    assert language.generation_config.suppress_tokens == [3]
    assert model.generation_config.suppress_tokens == [3, model.config.image_token_id]
    now = [*model.vision_tower.parameters(), *model.language_model.parameters()]
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(kept, now, strict=True))
