"""Mixing by the prompt: no answer is ever seen, and every way to run a model sees one prompt."""

import pytest
import torch
from helpers import checks
from helpers.any_size import LIMITS, SIZES, draw_image
from helpers.checks import GREEDY, IMAGE
from helpers.engine_checks import check_answers, make_question
from helpers.fusions import DIM, HIDDEN, features, fusion
from helpers.packing import compare_with_alone
from helpers.runs import run, stage, write_records
from helpers.tiny import tiny_llava, tiny_model
from torch import nn

from sparsecut import Plan, Shortcut, load, upgrade
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.ablation import FeaturesInMemory, explain
from sparsecut.evaluation.evaluator import evaluate
from sparsecut.evaluation.heat_maps import make_heat_maps
from sparsecut.hooks import RECOMPUTES_HOOKS
from sparsecut.mixers import Blend, BlendByPrompt
from sparsecut.profiling.counting import count_plan
from sparsecut.prompts import prepare_inputs
from sparsecut.schema import UserError
from sparsecut.serving.engine import Engine
from sparsecut.serving.vllm.checks import check_servable

BY_PROMPT = {
    "tiles": 2,
    "shortcuts": [
        {"taps": [1, 3, -2], "layer": 0, "mix": "blend_by_prompt"},
        {"taps": [[0, 1], -2], "layer": 1, "mix": "blend_by_prompt"},
        {"taps": [-2], "layer": 3, "grain": 2},
    ],
}
ROWS = [[20, 21, 22], [5, IMAGE, 6, 7], [IMAGE, 8, IMAGE, 9, 10, 11], [23, 24], [12, 13, IMAGE, 14]]


def weigh_by_prompt(model):
    """Let the weights of taps differ much between prompts."""
    torch.manual_seed(5)
    for mixer in model.fusion.modules():
        if isinstance(mixer, BlendByPrompt):
            nn.init.normal_(mixer.scores)
    return model


@pytest.fixture(scope="module")
def model():
    return weigh_by_prompt(checks.join(plan=BY_PROMPT))


@pytest.fixture(scope="module")
def inputs(model):
    return checks.batch(model, ROWS)


@pytest.fixture(scope="module")
def greedy(model, inputs):
    return model.generate(**inputs, **GREEDY)


@pytest.fixture(scope="module")
def tiny():
    return weigh_by_prompt(tiny_model(BY_PROMPT)[0]), tiny_model(BY_PROMPT)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records"))


def read_prompts(model, call) -> torch.Tensor:
    """The vectors that the fusion gets while `call` runs."""
    seen = []
    handle = model.fusion.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["prompts"]), with_kwargs=True
    )
    try:
        call()
    finally:
        handle.remove()
    [prompts] = seen
    return prompts


# ---- the mixer


def test_the_weights_are_those_of_a_router_and_add_up_to_one():
    shortcut = Shortcut((1, 2, 4), 0, "blend_by_prompt")
    mixer = BlendByPrompt(shortcut, Plan((shortcut,), tiles=2), DIM, 2, HIDDEN)
    nn.init.normal_(mixer.scores)
    nn.init.normal_(mixer.offsets)
    x, prompts = torch.randn(2, 3, 5, 4, DIM), torch.randn(2, HIDDEN)
    mixed = mixer(x, prompts)
    for image, prompt in enumerate(prompts):
        normed = (prompt - prompt.mean()) / (prompt.var(unbiased=False) + 1e-5).sqrt()
        inner = (mixer.router.weight @ normed + mixer.router.bias).clamp(min=0)
        weights = torch.softmax(mixer.scores @ inner + mixer.offsets, 0)
        torch.testing.assert_close(mixer.compute_weights(prompts)[image], weights)
        expected = sum(w * tap for w, tap in zip(weights, x[image], strict=True))
        torch.testing.assert_close(mixed[image], torch.cat(list(expected), -1))


def test_it_starts_as_the_plain_mean_for_every_prompt():
    taps = ((1, 2, 4), 0)
    module = fusion(Shortcut(*taps, "blend_by_prompt"))
    plain = fusion(Shortcut(*taps, "blend"))
    for values, start in module.initial_values():
        if not isinstance(start, tuple):
            nn.init.constant_(values, start)
    for name in ("linear_1", "linear_2"):
        linear = getattr(module.paths[0], name)
        getattr(plain.paths[0], name).load_state_dict(linear.state_dict())
    assert isinstance(plain.paths[0].mixer, Blend)
    states = features((1, 2, 4))
    by_prompt = module(states, prompts=torch.randn(2, HIDDEN))
    torch.testing.assert_close(by_prompt[0], plain(states)[0])


# ---- no answer is seen


@torch.no_grad()
def add_answers(inputs, answers) -> dict:
    """A training batch: each prompt with an answer behind it, which is trained."""
    ids = torch.cat([inputs["input_ids"], answers], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    labels = torch.full_like(ids, -100)
    labels[:, -answers.shape[1] :] = answers
    pixels = inputs["pixel_values"]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@torch.no_grad()
def test_another_answer_changes_nothing_before_it(model, inputs):
    first = torch.randint(30, 60, (len(ROWS), 6))
    outputs = [model(**add_answers(inputs, answers)) for answers in (first, first.flip(1))]
    assert torch.equal(outputs[0].image_hidden_states, outputs[1].image_hidden_states)
    assert torch.equal(outputs[0].logits[:, :-6], outputs[1].logits[:, :-6])


@torch.no_grad()
def test_another_question_changes_what_is_added(model, inputs):
    answers = torch.full((len(ROWS), 2), 30)
    batch = add_answers(inputs, answers)
    other = {**batch, "input_ids": torch.where(batch["input_ids"] == 7, 9, batch["input_ids"])}
    before, after = (model(**one).image_hidden_states for one in (batch, other))
    changed = (before != after).any(-1).unflatten(0, (4, -1)).any(1)
    assert changed.tolist() == [True, False, False, False]  # the image of the row with the 7


@torch.no_grad()
def test_training_scoring_and_generation_see_one_prompt(model, inputs):
    answers = torch.randint(30, 60, (len(ROWS), 4))
    batch = add_answers(inputs, answers)
    trained = read_prompts(model, lambda: model(**batch))
    labels = batch.pop("labels")
    scored = read_prompts(model, lambda: model(**batch, prompt_mask=labels == -100))
    generated = read_prompts(model, lambda: model.generate(**inputs, **GREEDY))
    assert trained.shape == (4, model.get_input_embeddings().weight.shape[1])
    torch.testing.assert_close(trained, scored)
    torch.testing.assert_close(trained, generated)
    row = model.get_input_embeddings().weight[[5, 6, 7]].mean(0)
    torch.testing.assert_close(generated[0], row)


def test_a_pass_that_cannot_tell_prompts_from_answers_is_refused(model, inputs):
    with pytest.raises(UserError, match="prompt_mask"):
        model(**inputs)
    with pytest.raises(UserError, match="summarize_prompts"):
        model.get_image_features(inputs["pixel_values"])
    with pytest.raises(UserError, match="4 images need 4"):
        model.get_image_features(inputs["pixel_values"], prompts=torch.zeros(3, 32))
    with pytest.raises(UserError, match="16 image tokens"):
        model.generate(**{**inputs, "pixel_values": inputs["pixel_values"][:3]}, **GREEDY)
    texts = {"input_ids": torch.tensor([ROWS[0]])}
    assert model(**texts).logits.shape[:2] == (1, 3)  # without images nothing is needed


@torch.no_grad()
def test_a_record_with_two_answers_is_routed_by_what_stands_before_the_first(model):
    ids = torch.tensor([checks.expanded(model, [5, IMAGE, 6, 30, 31, IMAGE, 8, 40])])
    labels = ids.masked_fill((ids < 30) | (ids == IMAGE), -100)
    pixels = checks.batch(model, [[IMAGE, IMAGE]])["pixel_values"]
    batch = {"input_ids": ids, "labels": labels, "pixel_values": pixels}
    prompts = read_prompts(model, lambda: model(**batch))
    expected = model.get_input_embeddings().weight[[5, 6]].mean(0)
    torch.testing.assert_close(prompts, expected.expand(2, -1))


def test_the_router_learns_and_embeddings_get_no_gradient_from_it(model, inputs):
    batch = add_answers(inputs, torch.randint(30, 60, (len(ROWS), 4)))
    model.zero_grad()
    model(**batch).loss.backward()
    for mixer in (path.mixer for path in model.fusion.paths[:2]):
        assert mixer.router.weight.grad.abs().sum() > 0 and mixer.scores.grad.abs().sum() > 0
    prompts = read_prompts(model, lambda: model(**batch))
    assert not prompts.requires_grad
    model.zero_grad()


# ---- every way to generate


def test_a_batch_is_its_rows_one_by_one(model, inputs, greedy):
    taken = 0
    for number, row in enumerate(ROWS):
        ids = torch.tensor([checks.expanded(model, row)])
        images = inputs["pixel_values"][taken : taken + row.count(IMAGE)]
        taken += len(images)
        given = {"pixel_values": images} if len(images) else {}
        alone = model.generate(input_ids=ids, **given, **GREEDY)[0, ids.shape[1] :]
        assert torch.equal(alone, greedy[number, inputs["input_ids"].shape[1] :])


def test_cached_is_uncached(model):
    checks.cached(model)


def test_beams_are_those_of_the_rows(model):
    checks.beams(model)


@pytest.mark.skipif(
    RECOMPUTES_HOOKS, reason="before 5.23 transformers gives every chunk all images"
)
def test_a_prompt_read_in_chunks(model, inputs, greedy):
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=3), greedy)


def test_embeddings_instead_of_ids(model, inputs, greedy):
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    out = model.generate(inputs_embeds=embeddings, **rest, **GREEDY)
    assert torch.equal(out, greedy[:, inputs["input_ids"].shape[1] :])


def test_guesses_of_an_assistant_change_nothing(model, inputs, greedy):
    ids = torch.tensor([checks.expanded(model, ROWS[1])])
    twin = weigh_by_prompt(checks.join(plan=BY_PROMPT))
    given = {"input_ids": ids, "pixel_values": inputs["pixel_values"][:1]}
    guessed = model.generate(**given, **GREEDY, assistant_model=twin)
    assert torch.equal(guessed[0, ids.shape[1] :], greedy[1, inputs["input_ids"].shape[1] :])


def test_images_of_any_size_in_a_batch_are_those_alone():
    model, processor = tiny_model(BY_PROMPT, **LIMITS)
    weigh_by_prompt(model)
    texts = ["<image> what is it", "<image> are you sure"]
    images = [draw_image(*size) for size in SIZES[:2]]
    together = prepare_inputs(model, processor, texts, [[image] for image in images])
    fused = read_features(model, together)
    alone = []
    for text, image in zip(texts, images, strict=True):
        alone += read_features(model, prepare_inputs(model, processor, [text], [[image]]))
    for a, b in zip(fused, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def read_features(model, inputs) -> list[torch.Tensor]:
    text = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    return list(model.encode_for_prompts(text, **inputs).pooler_output)


# ---- the applications


def test_packed_rows_have_the_losses_of_the_records_alone(tiny, folder):
    model, processor = tiny
    encoder = example_encoder(processor)
    data, collator = TrainingData(read_examples(folder / "data.json"), encoder), Collator(encoder)
    rows = [[0, 5, 1], [6, 2, 10]]
    packed = collator([[data[i] for i in row] for row in rows])
    compare_with_alone(model, packed, collator([data[i] for row in rows for i in row]))


def test_a_run_trains_packed_rows_and_its_model_loads_and_answers_alike(folder, tmp_path):
    parts = ["fusion", "vision"]
    model, processor = run(folder, stage(folder, train=parts, pack=64), plan=BY_PROMPT)
    router = model.fusion.paths[0].mixer
    assert router.scores.abs().sum() > 0
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    examples = read_examples(folder / "data.json")
    answers = [evaluate(m, processor, examples).records for m in (model.eval(), load(tmp_path)[0])]
    assert answers[0] == answers[1]


def test_cached_features_give_the_same_answers(tiny, folder):
    model, processor = tiny
    examples = [e for e in read_examples(folder / "data.json") if e.images]
    cache = FeaturesInMemory(model, processor, examples)
    with_cache = evaluate(model, processor, examples, feature_cache=cache).records
    assert with_cache == evaluate(model, processor, examples).records


def test_a_server_answers_many_as_the_model_answers_one(tiny):
    model, processor = tiny
    engine = Engine(model, processor, max_batch=8)
    try:
        check_answers(engine, [make_question(processor, i) for i in range(5)], length=6)
        assert not engine.counts["cached_images"]
    finally:
        engine.close()


def test_heat_maps_and_explanations_are_made(tiny, folder):
    model, processor = tiny
    examples = [e for e in read_examples(folder / "data.json") if e.images][:3]
    maps = make_heat_maps(model, processor, examples[0], kinds=["size", "gradient"])
    assert not maps.get(1, "size").is_empty and not maps.get(0, "gradient").is_empty
    explanation = explain(model, processor, examples, max_new_tokens=2)
    assert "shuffled 1" not in explanation["conditions"]
    assert explanation["shortcuts"][1]["ratio"] > 0


def test_costs_are_counted(model):
    config = model.config
    plans = [Plan((Shortcut((1, 3, -2), 0, mix),)) for mix in ("blend_by_prompt", "blend")]
    parts = (config.vision_config, config.text_config)
    costs = [count_plan(*parts, plan, num_text_tokens=8) for plan in plans]
    assert costs[0].num_fusion_parameters > costs[1].num_fusion_parameters
    assert costs[0].fusion_flops > costs[1].fusion_flops


def test_what_encodes_images_before_the_prompt_refuses_it(model):
    with pytest.raises(UserError, match=r"blend_by_prompt.*before the prompt"):
        upgrade(tiny_llava()[0], BY_PROMPT, processor=tiny_llava()[1])
    with pytest.raises(UserError, match="blend_by_prompt"):
        check_servable(model.config)
