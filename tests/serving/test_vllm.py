"""Models inside vLLM answer as `generate` does, token for token.

They run where vLLM is installed: `make vllm-test` makes an environment with it.
"""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")

from helpers.vllm_models import (
    ask_engine,
    draw_images,
    generate_answer,
    generate_without_shortcuts,
    make_request,
    save_vllm_model,
    start_engine,
    stop_engine,
)

QUESTION = "<image> what is it"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, model, processor) of one built model."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    return folder, *save_vllm_model(folder)


@pytest.fixture(scope="module")
def answers(saved):
    """64 images, and what `generate` answers to each."""
    _, model, processor = saved
    images = draw_images(64)
    return images, [generate_answer(model, processor, QUESTION, [image]) for image in images]


@pytest.fixture(scope="module", params=["whole prompts", "chunks of 16 tokens"])
def engine(request, saved):
    """An engine in this process; prefix caching is on."""
    settings = {}
    if request.param != "whole prompts":
        settings = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_chunked_prefill": True}
    engine = start_engine(saved[0], enable_prefix_caching=True, **settings)
    yield engine
    stop_engine(engine)


def test_64_images_alone(engine, saved, answers):
    processor = saved[2]
    images, wanted = answers
    for image, answer in zip(images, wanted, strict=True):
        assert ask_engine(engine, processor, [make_request(processor, QUESTION, [image])]) == [
            answer
        ]
    assert len({tuple(answer) for answer in wanted}) > 32  # else the images would not count


def test_batches_of_8_mixed_with_texts(engine, saved, answers):
    _, model, processor = saved
    engine.reset_prefix_cache()
    images, wanted = answers
    texts = ["what is it", "is it red", "a b c d ."]
    text_answers = [generate_answer(model, processor, text) for text in texts]
    for start in range(0, 40, 5):
        requests = [
            make_request(processor, QUESTION, [image]) for image in images[start : start + 5]
        ]
        requests[1:1] = [make_request(processor, text) for text in texts]
        want = [*wanted[start : start + 1], *text_answers, *wanted[start + 1 : start + 5]]
        assert ask_engine(engine, processor, requests) == want


def test_shortcuts_change_the_answers(saved, answers):
    _, model, processor = saved
    images, wanted = answers
    off = [generate_without_shortcuts(model, processor, QUESTION, [x]) for x in images[:8]]
    assert all(a != b for a, b in zip(off, wanted, strict=False))


@pytest.mark.parametrize(
    "text",
    [
        "<image> <image> what is it",
        "<image> is the <image> red",
        "what is it <image>",
        "a b <image> c d <image> <image> one two three",
    ],
)
def test_images_at_any_place(engine, saved, text):
    _, model, processor = saved
    images = draw_images(3, seed=5)[: text.count("<image>")]
    want = generate_answer(model, processor, text, images)
    assert ask_engine(engine, processor, [make_request(processor, text, images)]) == [want]


def test_repeated_images_and_prefixes(engine, saved, answers):
    _, model, processor = saved
    images, _ = answers
    beginning = f"{QUESTION} a b c d one two three what is it"  # more than a block of the cache
    texts = [f"{beginning} {word}" for word in ("red", "blue", "cat")]
    requests = [make_request(processor, text, [images[0]]) for text in texts]
    requests.append(make_request(processor, texts[0], [images[1]]))
    want = [generate_answer(model, processor, text, [images[0]]) for text in texts]
    want.append(generate_answer(model, processor, texts[0], [images[1]]))
    for request, answer in zip(requests, want, strict=True):
        assert ask_engine(engine, processor, [request]) == [answer]
    assert ask_engine(engine, processor, requests) == want
    assert want[0] != want[3]


def test_the_prompt_is_the_processors(engine, saved):
    processor = saved[2]
    images = draw_images(2)
    text = "<image> is the <image> red"
    output = engine.generate([make_request(processor, text, images)], use_tqdm=False)[0]
    inputs = processor(images=images, text=text, return_tensors="pt")
    assert output.prompt_token_ids == inputs["input_ids"][0].tolist()


def test_text_of_a_prompt_is_read_as_its_tokens(engine, saved, answers):
    processor = saved[2]
    images, wanted = answers
    request = {"prompt": QUESTION, "multi_modal_data": {"image": images[3]}}
    assert ask_engine(engine, processor, [request]) == [wanted[3]]
