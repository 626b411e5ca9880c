"""Our models in lmms-eval: `python -m lmms_eval --model sparsecut --model_args pretrained=DIR
--tasks ...`.

The harness finds `manifest` by the entry point group `lmms_eval.models`. `SparseCut` answers its chat messages, and
`SparseCutSimple` (--force_simple) its older form of text and pictures, which tasks that score given choices need. Both
are made when they are asked for, since their base class lives in the harness; `Adapter` is what they add to it, and needs no harness.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from ..building import load
from ..imaging import open_image
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
CLASSES = {"SparseCut": False, "SparseCutSimple": True}  # name: is_simple, as the harness calls it


def manifest():
    """What lmms-eval registers: the model's name and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sparsecut", f"{__name__}.SparseCutSimple", f"{__name__}.SparseCut")


class Adapter:
    """Requests of the harness to answers of a saved model.

    pretrained: its folder or hub name. batch_size: requests answered at once. device: as cpu or
    cuda:0; by default the accelerator, of several processes each its own. max_new_tokens: longest
    answer where a task asks for longer ones, or names no length. dtype: of the weights, as
    bfloat16; by default as saved.
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
        self.batch_size = _whole("batch_size", batch_size)
        self.max_new_tokens = _whole("max_new_tokens", max_new_tokens)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(
                f"dtype is {dtype!r}, but must be a number format, as float32, bfloat16 or float16"
            )
        self.device = torch.device(device or _own_device())
        model, self.processor = load(str(pretrained))
        self.model = model.to(self.device, dtype=dtype and getattr(torch, dtype)).eval()

    def generate_until(self, requests: Sequence) -> list[str]:
        """An answer to every request, in their order; those with equal settings are answered
        together.
        """
        asked = [self._asked(request.args) for request in requests]
        groups: dict[str, list[int]] = {}
        for i, (_, _, settings) in enumerate(asked):
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(i)
        answers = [""] * len(asked)
        for places in groups.values():
            places.sort(key=lambda i: -len(asked[i][0]))  # prompts of like length together
            for start in range(0, len(places), self.batch_size):
                chunk = places[start : start + self.batch_size]
                found = self._answers([asked[i] for i in chunk])
                for i, answer in zip(chunk, found, strict=True):
                    answers[i] = answer
                    self.cache_hook.add_partial(
                        "generate_until", (asked[i][0], asked[i][2]), answer
                    )
        return answers

    def loglikelihood(self, requests: Sequence) -> list:
        """`losses` as the harness takes them: it would write a bare pair as a string."""
        from lmms_eval.api.instance import GenerationResult

        return [GenerationResult(pair) for pair in self.losses(requests)]

    @torch.inference_mode()
    def losses(self, requests: Sequence) -> list[tuple[float, bool]]:
        """For every request the mean loss of its continuation's tokens, and whether greedy decoding
        would write it.

        A loss, since the harness takes the choice with the least value, whatever the method's name
        says.
        """
        asked = [self._asked(request.args) for request in requests]
        return [
            self._loss(prompt, pictures, continuation) for prompt, pictures, continuation in asked
        ]

    def generate_until_multi_round(self, requests: Sequence) -> list[str]:
        """Refused: no task of several rounds is known to work."""
        raise UserError(
            f"{len(requests)} requests ask in several rounds, which this model does not do in the"
            " harness; leave the task out"
        )

    def _asked(self, args: tuple) -> tuple[str, list[Image.Image], object]:
        """(prompt, pictures, settings or continuation) of a request's arguments, in either form of
        the harness.
        """
        # The form is seen by what comes second: the harness sends either one to a chat model,
        # depending on how a task was named.
        if callable(args[1]):
            _, to_messages, more, doc_id, task, split = args
            turns = to_messages(self.task_dict[task][split][doc_id])
            messages, pictures = chat_messages(turns, self.processor.image_token)
        else:
            text, more, show, doc_id, task, split = (
                args if len(args) > 2 else (*args, None, None, None, None)
            )
            visuals = (show(self.task_dict[task][split][doc_id]) or []) if show else []
            messages = [simple_message(text, visuals, self.processor.image_token)]
            pictures = [_picture(one) for one in visuals]
        return render_prompt(self.processor, messages), pictures, more

    @torch.inference_mode()
    def _answers(self, asked: list[tuple]) -> list[str]:
        prompts, pictures, (settings, *_) = zip(*asked, strict=True)
        config, until = self._config(settings)
        inputs = prepare_inputs(self.model, self.processor, list(prompts), list(pictures))
        for length in inputs["attention_mask"].sum(-1).tolist():
            remedy = "lower it with --model_args ...,max_new_tokens=N"
            check_length(self.model, length, config.max_new_tokens, "a prompt", remedy)
        found = decode_answers(
            self.processor, inputs, self.model.generate(**inputs, generation_config=config)
        )
        return [cut(answer, until) for answer in found]

    def _config(self, settings: dict):
        """The generation settings of a task, and its stop strings; what is not among SETTINGS is
        named once in the log.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        if ignored := given.keys() - {*SETTINGS, *_IGNORED}:
            LOG.warning(
                "the task's generation settings %s have no meaning here", ", ".join(sorted(ignored))
            )
            _IGNORED.update(ignored)
        config = make_greedy_config(
            self.model,
            min(int(given.get("max_new_tokens", self.max_new_tokens)), self.max_new_tokens),
        )
        temperature = float(given.get("temperature", 0))
        if given.get("do_sample", temperature > 0):
            config.update(
                do_sample=True,
                temperature=temperature or 1.0,
                top_p=float(given.get("top_p", 1.0)),
                top_k=0,
            )
        config.update(num_beams=int(given.get("num_beams", 1)))
        until = given.get("until", ())
        return config, (until,) if isinstance(until, str) else tuple(until)

    def _loss(
        self, prompt: str, pictures: list[Image.Image], continuation: str
    ) -> tuple[float, bool]:
        whole, before = (
            prepare_inputs(self.model, self.processor, [text], [pictures])
            for text in (prompt + continuation, prompt)
        )
        check_length(
            self.model,
            whole["input_ids"].shape[1],
            0,
            "a prompt with its choice",
            "leave the task out",
        )
        start = before["input_ids"].shape[1]
        num_new = whole["input_ids"].shape[1] - start
        if num_new < 1 or not torch.equal(whole["input_ids"][:, :start], before["input_ids"]):
            raise UserError(
                f"the choice {continuation!r} runs into the last token of its prompt, so it has no"
                ' loss of its own; give the task a target_delimiter, as " "'
            )
        logits = self.model(**whole).logits[0, -num_new - 1 : -1].float()
        ids = whole["input_ids"][0, -num_new:]
        loss = torch.nn.functional.cross_entropy(logits, ids)
        return loss.item(), bool((logits.argmax(-1) == ids).all())


_IGNORED: set[str] = set()


def simple_message(text: str, visuals: Sequence, token: str) -> dict:
    """A user's turn of a text and pictures, which come first where the text does not say where they
    stand.
    """
    count = text.count(token)
    if count not in (0, len(visuals)):
        raise UserError(
            f"a question has {count} {token} but {len(visuals)} pictures; the task must write one"
            " where each stands, or none"
        )
    return {"role": "user", "content": text if count else f"{token}\n" * len(visuals) + text}


def chat_messages(turns: Sequence[dict], token: str) -> tuple[list[dict], list[Image.Image]]:
    """The harness's turns as ours, a placeholder on a line of its own for every picture, and the
    pictures in order.
    """
    messages, pictures = [], []
    for turn in turns:
        parts = turn["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        text = ""
        for i, part in enumerate(parts):
            if part["type"] == "text":
                if token in part["text"]:
                    raise UserError(
                        f"a question's text holds {token}, the model's mark for a picture; change"
                        " the task"
                    )
                text += part["text"]
            elif part["type"] == "image":
                pictures.append(_picture(part["url"]))
                text += token + "\n" * (i + 1 < len(parts))
            else:
                raise UserError(
                    f"a question holds {part['type']}, but these models take texts and pictures"
                    " only"
                )
        messages.append({"role": turn["role"], "content": text})
    return messages, pictures


def cut(answer: str, until: Sequence[str]) -> str:
    """The answer up to the first of the stop strings."""
    places = [place for stop in until if stop and (place := answer.find(stop)) >= 0]
    return answer[: min(places)].strip() if places else answer


def _picture(visual) -> Image.Image:
    if not isinstance(visual, Image.Image | str):
        raise UserError(
            f"a question shows {type(visual).__name__}, but these models take pictures only; leave"
            " the task out"
        )
    return open_image(visual)


def _whole(name: str, value) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise UserError(f"{name} is {value!r}, but must be a whole number of at least 1")
    return int(value)


def _own_device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    return f"{torch.accelerator.current_accelerator().type}:{os.environ.get('LOCAL_RANK', 0)}"


def __getattr__(name: str) -> type | Callable:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    globals()[name] = type(
        name, (Adapter, lmms), {"is_simple": CLASSES[name], "__doc__": Adapter.__doc__}
    )
    return globals()[name]
