"""SparseCut models in the harness lmms-eval: `python -m lmms_eval --model sparsecut ...`.

The harness finds `manifest` by the entry point group `lmms_eval.models`. `SparseCut` answers its
chat messages. `SparseCutSimple` (--force_simple) answers its older form of text and images, which
tasks with given choices need. Both classes are made on access, because their base class is in the
harness. `Adapter` is what they add to it, and needs no harness.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import GenerationConfig

from ..building import load
from ..pixels import open_image
from ..prompts import (
    check_length,
    decode_answers,
    make_greedy_config,
    prepare_inputs,
    render_prompt,
)
from ..schema import UserError

LOG = logging.getLogger(__name__)
SETTINGS = ("max_new_tokens", "until", "do_sample", "temperature", "top_p", "num_beams")
CLASSES = {"SparseCut": False, "SparseCutSimple": True}  # name: the harness's `is_simple`


def manifest():
    """What lmms-eval registers: the model's name and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sparsecut", f"{__name__}.SparseCutSimple", f"{__name__}.SparseCut")


@dataclass(frozen=True)
class Request:
    """A request of the harness in our form.

    Attributes:
        prompt: The rendered prompt.
        images: Its images, in order.
        payload: The task's generation settings, or the continuation whose loss is wanted.
    """

    prompt: str
    images: list[Image.Image]
    payload: dict | str


class Adapter:
    """A saved model that answers requests of lmms-eval.

    Args:
        pretrained: The model's folder or hub name.
        batch_size: Requests that are answered at once.
        device: Such as cpu or cuda:0. By default the accelerator; each of several processes has
            its own.
        max_new_tokens: The longest answer, where a task asks for longer ones or names no length.
        dtype: Of the weights, such as bfloat16. By default as saved.
        max_batch_size: Not used; the harness always passes it.

    Raises:
        UserError: An argument is not allowed, or the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int | str = 1024,
        dtype: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.batch_size = _parse_positive("batch_size", batch_size)
        self.max_new_tokens = _parse_positive("max_new_tokens", max_new_tokens)
        self.device = torch.device(device or _get_local_device())
        torch_dtype = _parse_dtype(dtype)
        model, self.processor = load(str(pretrained))
        self.model = model.to(self.device, dtype=torch_dtype).eval()
        self.ignored_settings: set[str] = set()

    def generate_until(self, requests: Sequence) -> list[str]:
        """Answer requests, in their order. Those with equal settings are answered together."""
        read = [self._read_request(request.args) for request in requests]
        answers = [""] * len(read)
        for indices in _group_by_settings(read):
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                batch_answers = self._answer([read[i] for i in batch])
                for i, answer in zip(batch, batch_answers, strict=True):
                    answers[i] = answer
                    self._add_to_cache(read[i], answer)
        return answers

    def _add_to_cache(self, request: Request, answer: str) -> None:
        """Hand an answer to the harness's cache."""
        key = (request.prompt, request.payload)
        self.cache_hook.add_partial("generate_until", key, answer)

    def loglikelihood(self, requests: Sequence) -> list:
        """`compute_losses` as the harness takes them; it would write a bare pair as a string."""
        from lmms_eval.api.instance import GenerationResult

        return [GenerationResult(pair) for pair in self.compute_losses(requests)]

    @torch.inference_mode()
    def compute_losses(self, requests: Sequence) -> list[tuple[float, bool]]:
        """The mean loss of a continuation's tokens, and whether greedy decoding would write it.

        Losses, although the harness calls its method loglikelihood: it takes the choice with the
        least value.
        """
        return [self._compute_loss(self._read_request(request.args)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence) -> list[str]:
        """Raise UserError: tasks of several rounds are not supported."""
        raise UserError(
            f"{len(requests)} requests ask in several rounds, which is not supported here; leave"
            " the task out"
        )

    def _read_request(self, args: tuple) -> Request:
        """Read a request's arguments, in either form of the harness.

        The harness sends both forms to a chat model, depending on how a task was named. In the form
        with messages, the second argument is a function.
        """
        token = self.processor.image_token
        if callable(args[1]):
            _, build_messages, payload, doc_id, task, split = args
            turns = build_messages(self.task_dict[task][split][doc_id])
            messages, images = convert_messages(turns, token)
        else:
            text, payload, *place = args
            visuals = []
            if place and place[0]:
                get_visuals, doc_id, task, split = place
                visuals = get_visuals(self.task_dict[task][split][doc_id]) or []
            messages = [convert_simple(text, visuals, token)]
            images = [_open_visual(visual) for visual in visuals]
        return Request(render_prompt(self.processor, messages), images, payload)

    @torch.inference_mode()
    def _answer(self, batch: list[Request]) -> list[str]:
        """Answers to requests with equal settings."""
        config, stop_strings = self._read_settings(batch[0].payload)
        prompts = [request.prompt for request in batch]
        images = [request.images for request in batch]
        inputs = prepare_inputs(self.model, self.processor, prompts, images)
        lengths = inputs["attention_mask"].sum(-1)
        remedy = "lower it with --model_args ...,max_new_tokens=N"
        for length in lengths.tolist():
            check_length(self.model, length, config.max_new_tokens, "a prompt", remedy)
        token_ids = self.model.generate(**inputs, generation_config=config)
        answers = decode_answers(self.processor, inputs, token_ids)
        return [cut_at_stop(answer, stop_strings) for answer in answers]

    def _read_settings(self, settings: dict) -> tuple[GenerationConfig, tuple[str, ...]]:
        """A task's settings as a generation config and stop strings.

        Settings without meaning here are named in the log, once.
        """
        settings = {key: value for key, value in settings.items() if value is not None}
        ignored = settings.keys() - {*SETTINGS} - self.ignored_settings
        if ignored:
            names = ", ".join(sorted(ignored))
            LOG.warning("the task's generation settings %s have no meaning here", names)
            self.ignored_settings |= ignored
        longest = int(settings.get("max_new_tokens", self.max_new_tokens))
        longest = min(longest, self.max_new_tokens)
        config = make_greedy_config(self.model, longest)
        temperature = float(settings.get("temperature", 0))
        if settings.get("do_sample", temperature > 0):
            config.update(
                do_sample=True,
                temperature=temperature or 1.0,
                top_p=float(settings.get("top_p", 1.0)),
                top_k=0,
            )
        config.update(num_beams=int(settings.get("num_beams", 1)))
        until = settings.get("until", ())
        if isinstance(until, str):
            until = (until,)
        return config, tuple(until)

    def _compute_loss(self, request: Request) -> tuple[float, bool]:
        """The loss of one continuation, and whether every token of it is the likeliest."""
        continuation = request.payload
        prompt_inputs = self._encode(request.prompt, request.images)
        inputs = self._encode(request.prompt + continuation, request.images)
        prompt_ids = prompt_inputs["input_ids"][0]
        token_ids = inputs["input_ids"][0]
        num_tokens = len(token_ids)
        name = "a prompt with its choice"
        check_length(self.model, num_tokens, 0, name, "leave the task out")
        num_new = num_tokens - len(prompt_ids)
        is_continued = torch.equal(token_ids[: len(prompt_ids)], prompt_ids)
        if num_new < 1 or not is_continued:
            raise UserError(
                f"the choice {continuation!r} shares a token with its prompt, so it has no loss of"
                ' its own; give the task a target_delimiter, as " "'
            )
        if self.model.plan.needs_prompt:
            is_prompt = torch.ones_like(inputs["input_ids"])
            is_prompt[:, num_tokens - num_new :] = 0
            inputs["prompt_mask"] = is_prompt
        outputs = self.model(**inputs)
        logits = outputs.logits[0, -num_new - 1 : -1].float()
        new_ids = token_ids[-num_new:]
        loss = torch.nn.functional.cross_entropy(logits, new_ids)
        is_greedy = torch.equal(logits.argmax(-1), new_ids)
        return loss.item(), is_greedy

    def _encode(self, prompt: str, images: list[Image.Image]):
        return prepare_inputs(self.model, self.processor, [prompt], [images])


def _group_by_settings(requests: Sequence[Request]) -> list[list[int]]:
    """Places of requests with equal settings, each group with prompts of like length together."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
        key = json.dumps(request.payload, sort_keys=True, default=str)
        groups.setdefault(key, []).append(i)
    for indices in groups.values():
        indices.sort(key=lambda i: -len(requests[i].prompt))
    return list(groups.values())


def convert_simple(text: str, visuals: Sequence, image_token: str) -> dict:
    """A user message of a text and its images.

    Images stand first, or where the text has placeholders.

    Raises:
        UserError: The text has placeholders, but not one for each image.
    """
    count = text.count(image_token)
    if count not in (0, len(visuals)):
        raise UserError(
            f"a question has {count} {image_token} but {len(visuals)} images; the task must write"
            " one where each image stands, or none"
        )
    if count == 0:
        text = f"{image_token}\n" * len(visuals) + text
    return {"role": "user", "content": text}


def convert_messages(
    turns: Sequence[dict], image_token: str
) -> tuple[list[dict], list[Image.Image]]:
    """The harness's messages as ours, with a placeholder on its own line for every image.

    Returns:
        (messages, images in order).

    Raises:
        UserError: A message holds something else than text and images.
    """
    messages = []
    images = []
    for turn in turns:
        parts = turn["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        text = ""
        for i, part in enumerate(parts):
            if part["type"] == "text":
                _check_text(part["text"], image_token)
                text += part["text"]
            elif part["type"] == "image":
                images.append(_open_visual(part["url"]))
                is_last = i + 1 == len(parts)
                text += image_token if is_last else f"{image_token}\n"
            else:
                raise UserError(
                    f"a question holds {part['type']}, but these models take text and images only"
                )
        messages.append({"role": turn["role"], "content": text})
    return messages, images


def _check_text(text: str, image_token: str) -> None:
    if image_token in text:
        raise UserError(
            f"a question's text holds {image_token}, the model's placeholder for an image; change"
            " the task"
        )


def cut_at_stop(answer: str, stop_strings: Sequence[str]) -> str:
    """The answer up to the first stop string."""
    places = [answer.find(stop) for stop in stop_strings if stop]
    places = [place for place in places if place >= 0]
    return answer[: min(places)].strip() if places else answer


def _open_visual(visual) -> Image.Image:
    if not isinstance(visual, Image.Image | str):
        raise UserError(
            f"a question shows {type(visual).__name__}, but these models take images only; leave"
            " the task out"
        )
    return open_image(visual)


def _parse_positive(name: str, value) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise UserError(f"{name} is {value!r}, but must be a whole number of at least 1")
    return int(value)


def _parse_dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if name is not None else None
    if name is not None and not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype is {name!r}, but must be a dtype such as float32 or bfloat16")
    return dtype


def _get_local_device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', 0)}"


def __getattr__(name: str) -> type:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    attributes = {"is_simple": CLASSES[name], "__doc__": Adapter.__doc__}
    globals()[name] = type(name, (Adapter, lmms), attributes)
    return globals()[name]
