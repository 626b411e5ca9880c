"""A recipe's arguments of the chat template hold in training and evaluation, and are saved."""

import json

import pytest
import torch
from helpers.runs import recipe, run, stage
from helpers.tiny import tiny_model

from sparsecut import load
from sparsecut.chat import Chat
from sparsecut.evaluation.evaluator import evaluate_recipe
from sparsecut.prompts import render_prompt
from sparsecut.schema import UserError
from sparsecut.training.stages import train

# Writes an empty thought into the last answer, and asks for it without.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER : ' + m.content + ' ' }}{% else %}"
    "{{ 'ASSISTANT : ' }}{{ '<think> </think> ' if loop.last else '' }}{{ m.content + ' </s> ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT : ' }}"
    "{% if enable_thinking is false %}{{ '<think> </think> ' }}{% endif %}{% endif %}"
)
THINK = {"enable_thinking": False}


def build_thinking():
    """(model, processor): the tiny model with a thinking template, with marks of its own."""
    model, processor = tiny_model()
    processor.tokenizer.add_tokens(["<think>", "</think>"])
    model.resize_token_embeddings(len(processor.tokenizer))
    processor.chat_template = TEMPLATE
    return model, processor


def make_recipe(folder, **changes):
    """A recipe that learns four answers by heart and is evaluated on them."""
    args = {"max_steps": 40, "learning_rate": 2e-2, "per_device_train_batch_size": 3}
    one = stage(folder, data="texts.json", train=["fusion", "language"], args=args)
    evaluate = {"data": {"path": str(folder / "texts.json")}, "max_new_tokens": 8}
    return recipe(folder, one, evaluate=evaluate, **changes)


@pytest.mark.parametrize("arguments", [{}, THINK])
def test_a_model_that_has_learned_its_records_scores_1(folder, arguments):
    torch.manual_seed(0)
    model, processor = build_thinking()
    one = make_recipe(folder, chat_template_kwargs=arguments)
    model, processor = train(one, model=model, processor=processor, shown=False)
    evaluate_recipe(one, model, processor)
    result = json.loads((folder / "out/eval/result.json").read_text())
    assert result["accuracy"] == 1
    line = json.loads((folder / "out/eval/predictions.jsonl").read_text().splitlines()[0])
    assert line["prompt"].endswith("</think> ") == bool(arguments)
    assert line["prediction"].startswith("<think>") == (not arguments)
    assert line.get("answer", line["prediction"]) == line["reference"]
    loaded, saved = load(folder / "out/final")
    messages = [{"role": "user", "content": "what is it"}]
    assert render_prompt(saved, messages).endswith("</think> ") == bool(arguments)
    answer = Chat(loaded, saved, max_new_tokens=8).ask("what is it")
    chat = Chat(loaded, saved, max_new_tokens=8)
    assert "".join(chat.stream("what is it")).strip() == answer == line["reference"]
    assert chat.messages[-1]["content"] == answer
    assert chat.raw_answers == [line["prediction"]]


def test_an_argument_that_no_template_reads_is_refused_before_training(folder):
    with pytest.raises(UserError, match="'enable_thinking'"):
        run(folder, chat_template_kwargs=THINK)
    assert not (folder / "out/one").exists()
