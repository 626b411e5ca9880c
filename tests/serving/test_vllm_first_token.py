"""The same messages become the same prompt in vLLM's chat completions and in our own server."""

from types import SimpleNamespace

import pytest
from helpers.tiny import SPECIAL, tiny_tokenizer
from helpers.vllm_models import draw_images, save_vllm_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparsecut.prompts import encode_prompts, render_prompt
from sparsecut.serving.vllm.first_token import make_chat_template

WRITES_FIRST = "{{ bos_token }}" + tiny_tokenizer().chat_template
IMAGE = {"type": "image"}
CONVERSATIONS = [
    [("user", [IMAGE, "what is it"])],
    [("user", ["what is", IMAGE, "it"])],
    [("user", ["is the", IMAGE, IMAGE])],
    [("user", [IMAGE, "what is it"]), ("assistant", ["a cat"]), ("user", ["are you sure"])],
    [("user", ["what is it"])],
]


def make_tokenizer(kind: str):
    """A tokenizer that writes a first token or none, with a template that does or does not."""
    tokenizer = tiny_tokenizer()
    if kind != "no first token":
        single = "<s> $A </s>" if kind == "and an end" else "<s> $A"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=single,
            special_tokens=[(name, tokenizer.vocab[name]) for name in ("<s>", "</s>")],
        )
    if kind == "the template writes it":
        tokenizer.chat_template = WRITES_FIRST
    return tokenizer


KINDS = {  # and whether vLLM needs another template
    "no first token": False,
    "a first token": True,
    "and an end": True,
    "the template writes it": False,
}


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """(kind, folder, processor) of a built model with a tokenizer of that kind."""
    folder = tmp_path_factory.mktemp("first_token") / "model"
    _, processor = save_vllm_model(folder, tokenizer=make_tokenizer(request.param))
    return request.param, folder, processor


def make_messages(conversation, url: str | None = None) -> list[dict]:
    """Messages of a request; without a URL those of a chat template."""
    messages = []
    for role, parts in conversation:
        content = []
        for part in parts:
            if part is not IMAGE:
                content.append({"type": "text", "text": part})
            elif url is None:
                content.append(part)
            else:
                content.append({"type": "image_url", "image_url": {"url": url}})
        messages.append({"role": role, "content": content})
    return messages


def read_as_our_server(processor, conversation) -> list[int]:
    """The prompt's ids in our own server."""
    messages = []
    for role, parts in conversation:
        texts = []
        for number, part in enumerate(parts):
            is_last = number + 1 == len(parts)
            token = processor.image_token + ("" if is_last else "\n")
            texts.append(token if part is IMAGE else part)
        messages.append({"role": role, "content": "".join(texts)})
    prompt = render_prompt(processor, messages)
    return encode_prompts(processor, [prompt], None)["input_ids"][0].tolist()


def test_a_template_is_made_where_the_first_token_would_be_lacking(saved):
    kind, _, processor = saved
    template = make_chat_template(processor)
    assert (template is not None) == KINDS[kind]
    for conversation in CONVERSATIONS:
        text = processor.tokenizer.apply_chat_template(
            make_messages(conversation),
            chat_template=template or processor.chat_template,
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = processor.tokenizer(processor.expand(text), add_special_tokens=False)["input_ids"]
        assert ids == read_as_our_server(processor, conversation)
        first = processor.tokenizer.bos_token_id
        assert ids.count(first) == (kind != "no first token")


def test_a_first_token_that_no_template_can_write_is_told(caplog):
    # A text's first word is read otherwise than a word after a special token.
    words = [*SPECIAL.values(), "USER", "\u2581USER"]
    ids = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)
    template = tiny_tokenizer().chat_template
    processor = SimpleNamespace(
        tokenizer=tokenizer, chat_template=template, num_views=1, num_image_tokens=4
    )
    assert make_chat_template(processor) is None
    assert "add_special_tokens" in caplog.text


def test_vllm_reads_what_our_server_reads(saved):
    pytest.importorskip("vllm", reason="vLLM is not installed; `make vllm-test` runs these tests")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.multimodal.utils import encode_image_url
    from vllm.renderers import ChatParams, renderer_from_config

    _, folder, processor = saved
    settings = {"max_model_len": 256, "dtype": "float32", "limit_mm_per_prompt": {"image": 4}}
    config = EngineArgs(str(folder), enforce_eager=True, **settings).create_engine_config()
    renderer = renderer_from_config(config)
    url = encode_image_url(draw_images(1)[0])
    params = ChatParams(
        chat_template=make_chat_template(processor),
        chat_template_kwargs={"add_generation_prompt": True, "tokenize": False},
    )
    for conversation in CONVERSATIONS:
        messages = make_messages(conversation, url)
        request = ChatCompletionRequest(model="m", messages=messages)
        tokens = request.build_tok_params(config.model_config)
        _, (prompt,) = renderer.render_chat([messages], params, tokens)
        assert prompt["prompt_token_ids"] == read_as_our_server(processor, conversation)
