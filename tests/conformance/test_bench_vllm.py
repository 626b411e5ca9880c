"""benchmarks/vllm.py compares equal things: the same prompts, answers of full length, ratios within
a round. Its servers run where vLLM is installed; here its parts do.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import sparsecut

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("vllm_models", "vllm_servers", "vllm_clients", "vllm_table")


@pytest.fixture(scope="module")
def parts():
    """The benchmark's modules by name."""
    sys.path.append(str(BENCHMARKS))
    import vllm_clients
    import vllm_models
    import vllm_servers
    import vllm_table

    yield {"models": vllm_models, "servers": vllm_servers}, vllm_clients, vllm_table
    sys.path.remove(str(BENCHMARKS))
    for name in PARTS:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def saved(parts, tmp_path_factory):
    """A folder with tiny models: a stock LLaVA and two plans."""
    folder = tmp_path_factory.mktemp("vllm_bench")
    parts[0]["models"].make_models_apart(folder, "tiny", ["llava", "sparsecut"], "cpu")
    return folder


def ask(model, processor, messages, images):
    """(prompt ids, ids of the answer) of a greedy answer to messages."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=text, images=images, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist()
    length = inputs["input_ids"].shape[1]
    return ids[:length], ids[length:]


def test_stock_and_our_models_read_the_same_prompts_and_never_end(saved, parts):
    questions = parts[1].Questions(12, 400, 64)
    (message,) = questions.ask("data:,", words_before=6)
    content = [{"type": "image"} if "image_url" in part else part for part in message["content"]]
    messages = [{"role": "user", "content": content}]
    images = [Image.effect_noise((64, 48), 90).convert("RGB")]
    stock = LlavaForConditionalGeneration.from_pretrained(saved / "stock").eval()
    prompt, answer = ask(stock, LlavaProcessor.from_pretrained(saved / "stock"), messages, images)
    assert len(answer) == 24
    for plan in ("llava", "sparsecut"):
        model, processor = sparsecut.load(saved / plan)
        its_prompt, its_answer = ask(model, processor, messages, images)
        assert its_prompt == prompt and len(its_answer) == 24
        weights = model.language_model.state_dict()
        same = stock.model.language_model.state_dict()
        assert all(torch.equal(weights[f"model.{name}"], same[name]) for name in same)
    vision = stock.model.vision_tower.state_dict()
    assert all(torch.equal(model.vision_tower.state_dict()[name], vision[name]) for name in vision)


def test_new_images_are_new_and_seen_ones_were_seen(parts):
    questions = parts[1].Questions(10, 100, 32)

    def list_urls(are_new):
        asked = questions.ask_many(16, are_new=are_new)
        return [messages[0]["content"][1]["image_url"]["url"] for messages in asked]

    new, seen = list_urls(True), list_urls(False)
    assert len({*new, *list_urls(True), *questions.images}) == 32 + len(questions.images)
    assert set(seen) == set(questions.images)


def test_flops_of_a_request(parts):
    models = parts[0]["models"]
    costs = models.count_costs(models.make_size("tiny"), ["sparsecut"], 64)
    assert costs["llava"]["language"] == costs["sparsecut"]["language"]
    assert costs["llava"]["request"] < costs["sparsecut"]["request"]


def test_stock_and_plans_get_the_same_options(parts):
    models, servers = parts[0]["models"], parts[0]["servers"]
    size = models.make_size("tiny")
    launch = servers.Launch(Path("models"), size, "cpu", 1, 0.1, 8, ("--seed", "3"))
    commands = []
    for name in ("stock", "sparsecut"):
        command = servers.build_vllm_command(servers.Server(name, launch, port=1))
        commands.append([word.replace(name, "NAME") for word in command])
    assert commands[0] == commands[1] and commands[0][-2:] == ["--seed", "3"]


def test_the_page_has_every_figure(parts):
    part = {"median": 2.0, "least": 1.5, "most": 2.5, "ratio": 0.5, "rounds": [1.5, 2.0, 2.5]}
    part |= {"ratio_least": 0.4, "ratio_most": 0.6}
    names = ("new 8", "seen 8", "first new", "first again")
    inside = {name: {**part, "ratio": 0.75} for name in names}
    result = {
        "machine": "a machine",
        "date": "2026-11-28",
        "size": "small",
        "versions": {"torch": "2.13.0"},
        "seconds": 9.0,
        "num_text_tokens": 48,
        "settings": {"new_tokens": 64, "clients": [8]},
        "costs": {"llava": {"language": 1e9, "request": 2e9}},
        "servers": {"stock": inside, "llava": inside, "local:llava": dict.fromkeys(names, part)},
    }
    page = parts[2].make_page(result)
    tables = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert tables == [7] * 8 + [6] * 5 + [5] * 3
    assert "| 128 | 0.750 (0.400 to 0.600) |" in page and "1.50 (new images, 8 clients)" in page
    assert "| 2000 (1500 to 2500) |" in page


def test_whoever_imports_vllm_does_not_get_the_benchmark():
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import vllm"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1 and "ModuleNotFoundError" in run.stderr
