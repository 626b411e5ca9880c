"""vLLM's server of an upgraded LLaVA: it answers as ours does, and outlives hostile requests."""

import base64

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")
pytest.importorskip("aiohttp")

from helpers.clients import complete, encode_image, get_text, make_messages, openai, post
from helpers.clients import start_server as start_our_server
from helpers.vllm_bases import make_upgraded
from helpers.vllm_models import SETTINGS, draw_images

from sparsecut.building import save
from sparsecut.serving.engine import Engine
from sparsecut.serving.vllm.command import VLLMSettings, make_command
from sparsecut.serving.vllm.replica import ServerProcess, find_free_port

TEMPLATE = """
{%- for message in messages %}{{ message['role'].upper() + ' : ' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}{{ '<image> ' if part['type'] == 'image' else part['text'] }}
{%- endfor %}{% endif %}{{ ' ' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT :' }}{% endif %}"""
OPTIONS = ["--gpu-memory-utilization", "0.1", "--enforce-eager", "--max-model-len", "256"]
IMAGES = draw_images(6)


def ask_turns(*questions) -> list[dict]:
    """A conversation of questions with their images, and an answer between two."""
    turns = []
    for text, *images in questions:
        turns += [*make_messages(text, *images), {"role": "assistant", "content": "a cat"}]
    return turns[:-1]


CONVERSATIONS = {
    "an image": ask_turns(("what is it", IMAGES[0])),
    "another one": ask_turns(("what is it", IMAGES[1])),
    "the first one again": ask_turns(("what is it", IMAGES[0])),
    "two images": ask_turns(("is it red", *IMAGES[2:4])),
    "text": ask_turns(("what is it",)),
    "turns": ask_turns(("what is it", IMAGES[4]), ("are you sure",)),
    "an image in the second turn": ask_turns(("what is it",), ("is it red", IMAGES[5])),
    "images in both turns": ask_turns(("what is it", IMAGES[4]), ("is it red", IMAGES[5])),
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """(OpenAI's client of our server, and of vLLM's) for the same model."""
    folder = tmp_path_factory.mktemp("vllm_server") / "model"
    model, processor, _ = make_upgraded("llava")
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    save(model, processor, folder)
    port = find_free_port()
    settings = VLLMSettings(
        str(folder), "127.0.0.1", port, "tiny", max_tokens=64, max_images=4, further=tuple(OPTIONS)
    )
    server = ServerProcess(make_command(settings), port, SETTINGS)
    engine = Engine(model, processor)
    try:
        server.wait_until_ready()
        url = f"{server.url}/v1"
        with (
            start_our_server(engine) as ours,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            yield ours, client
    finally:
        engine.close()
        server.close()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_those_of_our_server(clients, name):
    ours, theirs = (complete(client, CONVERSATIONS[name], max_tokens=12) for client in clients)
    assert get_text(theirs).strip() == get_text(ours)
    assert theirs.usage.prompt_tokens == ours.usage.prompt_tokens
    assert theirs.usage.completion_tokens == ours.usage.completion_tokens


@pytest.mark.parametrize("name", ["an image", "images in both turns"])
def test_streamed_answers(clients, name):
    texts = []
    for client in clients:
        chunks = complete(client, CONVERSATIONS[name], max_tokens=12, stream=True)
        texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert texts[1].strip() == texts[0]


def make_hostile() -> dict[str, tuple]:
    """(messages, settings) of requests that no server may answer."""
    image = encode_image(IMAGES[0])
    urls = {
        "no base64": "data:image/png;base64,@@@@",
        "no image": make_url(b"hello"),
        "a part of an image": make_url(image[: len(image) // 2]),
        "nothing": "data:image/png;base64,",
        "a drawing": make_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "a file": "file:///etc/passwd",
        "this machine": "http://127.0.0.1:1/a.png",
        "another machine": "http://example.org/a.png",
        "another protocol": "ftp://example.org/a.png",
    }
    parts = {name: {"type": "image_url", "image_url": {"url": url}} for name, url in urls.items()}
    parts["no text for an address"] = {"type": "image_url", "image_url": {"url": 7}}
    parts["no address"] = {"type": "image_url"}
    parts["a sound"] = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    parts["a video"] = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    hostile = {name: ([{"role": "user", "content": [part]}], {}) for name, part in parts.items()}
    plain = make_messages("what is it", IMAGES[0])
    hostile |= {
        "too many images": (make_messages("what is it", *IMAGES[:5]), {}),
        "a long prompt": (make_messages("what is it " * 5000), {}),
        "a prompt that its image makes too long": (make_messages("a " * 250, IMAGES[0]), {}),
        "no messages": ([], {}),
        "a number for a text": ([{"role": "user", "content": 7}], {}),
        "another model": (plain, {"model": "another"}),
        "negative temperature": (plain, {"temperature": -1}),
        "too many log-probabilities": (plain, {"logprobs": True, "top_logprobs": 999}),
        "a template": (plain, {"extra_body": {"chat_template": "{{ '<image>' * 9 }}"}}),
        "other views": (plain, {"extra_body": {"mm_processor_kwargs": {"do_resize": False}}}),
    }
    return hostile


def make_url(data: bytes) -> str:
    """Any bytes as the data URL of an image."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


HOSTILE = make_hostile()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_an_error_of_openais_form(clients, name):
    messages, settings = HOSTILE[name]
    with pytest.raises(openai.APIStatusError) as error:
        complete(clients[1], messages, **settings)
    assert error.value.status_code >= 400
    assert error.value.body["message"] and error.value.body["type"]
    check_alive(clients)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_requests_that_are_no_json(clients, text):
    assert post(clients[1], text).status_code == 400
    check_alive(clients)


def test_placeholders_in_texts_do_not_end_the_server(clients):
    for messages in make_messages("<image> what"), make_messages("<image> <image>", IMAGES[0]):
        complete(clients[1], messages)
    check_alive(clients)


def check_alive(clients) -> None:
    """Both servers still answer alike."""
    ours, theirs = (complete(client, CONVERSATIONS["two images"]) for client in clients)
    assert get_text(theirs).strip() == get_text(ours)
