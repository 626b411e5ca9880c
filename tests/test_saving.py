"""A saved model is an ordinary Hugging Face folder: for this package, for the Auto classes, and for
machines without it.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.example_bases import build_example_base
from helpers.tiny import tiny_language, tiny_model, tiny_tokenizer, tiny_vision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    pipeline,
)

from sparsecut import build, upgrade
from sparsecut.building import load, save
from sparsecut.config.paths import list_code_files
from sparsecut.schema import UserError

PROBE = """
ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 4, 7]])
pixels = torch.linspace(-1, 1, model.plan.num_views * 3 * 256).reshape(1, -1, 3, 16, 16)
with torch.no_grad():
    logits = model(input_ids=ids, pixel_values=pixels).logits
"""
LOAD = """
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from safetensors.torch import load_file
folder = {folder!r}
expected = load_file(folder + "/expected")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code={remote})
processor = AutoProcessor.from_pretrained(folder, trust_remote_code={remote})
headless = AutoModel.from_pretrained(folder, trust_remote_code={remote})
assert processor.expand("<image>") == "<image>" * 4
"""
COMPARE = """
assert torch.equal(logits, expected["logits"])
with torch.no_grad():
    states = headless(input_ids=ids, pixel_values=pixels).last_hidden_state
assert torch.equal(states, expected["states"])
new = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3)
assert new.shape[1] <= ids.shape[1] + 3
"""
LIGHT = """
import sys, sparsecut
heavy = {"torch", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, f"importing sparsecut loads {heavy}"
"""
FORK = """
import os, sys, traceback

def run(script):
    # A process that has imported what this one has.
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        exec(script, {{}})
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

failed = run({light!r})
import torch, torch._dynamo, PIL.Image  # shared by both: most of the time is spent here
failed |= run({first!r})
failed |= run({last!r})
sys.exit(bool(failed))
"""
OURS = """
assert type(model) is sparsecut.SparseCutForConditionalGeneration
assert type(model.config) is sparsecut.SparseCutConfig
assert type(processor) is sparsecut.SparseCutProcessor
"""
ABSENT = """
import sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)
absent = Absent()
sys.meta_path.insert(0, absent)
"""
PRESENT = """
assert "sparsecut" not in sys.modules
assert type(model).__module__.startswith("transformers_modules.")
sys.meta_path.remove(absent)
import sparsecut
"""

PROBE_NATIVE = """
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = {folder!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.new("RGB", (60, 20), (250, 80, 10))
inputs = processor(images=image, text="<image> what", return_tensors="pt")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, load_file(folder + "/expected")["logits"])
assert "sparsecut" not in sys.modules
"""


def run_probe(model):
    """Logits of one fixed prompt with one fixed image, and its last hidden states."""
    scope = {"torch": torch, "model": model}
    exec(PROBE, scope)
    inputs = {"input_ids": scope["ids"], "pixel_values": scope["pixels"]}
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return {"logits": scope["logits"], "states": states}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(model, processor, folder): saved with its code, and the results of the probe beside it."""
    folder = tmp_path_factory.mktemp("saved")
    model, processor = tiny_model()
    save(model, processor, folder)
    save_file(run_probe(model), folder / "expected")
    return model, processor, folder


def run_in_fresh_process(script, folder):
    """Run a script far from this repository and with an empty cache of remote code."""
    settings = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_auto_classes_know_the_model_with_the_package_and_without(saved, tmp_path):
    """The package may come before transformers, not at all, or after remote code of the model."""
    folder = str(saved[2])
    ours = LOAD.format(folder=folder, remote=False) + OURS + PROBE + COMPARE
    remote = LOAD.format(folder=folder, remote=True) + PROBE + COMPARE
    scripts = {
        "light": LIGHT,
        "first": "import sparsecut, torch\n" + ours,
        "last": ABSENT + remote + PRESENT + ours,
    }
    run_in_fresh_process(FORK.format(**scripts), tmp_path)


def test_a_pipeline_answers_as_generate_does(saved):
    model, processor, folder = saved
    image = {"type": "image", "image": Image.new("RGB", (30, 20))}
    content = [image, {"type": "text", "text": "what is it"}]
    chat = [{"role": "user", "content": content}]
    answers = pipeline("image-text-to-text", model=str(folder))(
        text=[chat, chat], max_new_tokens=3, return_full_text=False
    )
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template([chat], add_generation_prompt=True, **settings)
    output = model.generate(**prompt, max_new_tokens=3)
    expected = processor.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer[0]["generated_text"].strip() for answer in answers] == [expected.strip()] * 2


def test_code_is_saved_by_default_and_is_what_a_model_needs(saved):
    files = {path.name for path in saved[2].glob("*.py")}
    assert files >= {"modeling.py", "processing.py", "configuration.py", "plan.py", "hooks.py"}
    assert not files & {"modeling_upgraded.py", "families.py", "building.py", "drawing.py"}
    assert files <= set(list_code_files())
    assert "SPDX-License-Identifier: Apache-2.0" in (saved[2] / "saved_code.py").read_text()
    assert sum((saved[2] / name).stat().st_size for name in files) < 360_000
    maps = [read_auto_map(saved[2] / name) for name in ("config.json", "processor_config.json")]
    auto_classes = {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
    assert auto_classes | {"AutoModelForMultimodalLM"} == {*maps[0], *maps[1]}
    for place in (*maps[0].values(), *maps[1].values()):
        assert f"{place.partition('.')[0]}.py" in files


def read_auto_map(file):
    return json.loads(file.read_text()).get("auto_map")


def test_each_part_is_saved_with_its_code(saved, tmp_path):
    model, processor, folder = saved
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    for file in folder.glob("*.py"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    model.config.save_pretrained(tmp_path / "config")
    assert read_auto_map(tmp_path / "config/config.json") == read_auto_map(folder / "config.json")


def test_code_is_left_out_on_request(saved, tmp_path):
    model, processor, _ = saved
    save(model, processor, tmp_path, code=False)
    assert not list(tmp_path.glob("*.py"))
    assert read_auto_map(tmp_path / "config.json") is None
    loaded = load(tmp_path)
    assert type(loaded[1]) is type(processor)
    save(*loaded, tmp_path)
    save(*load(tmp_path), tmp_path / "again", code=False)
    assert read_auto_map(tmp_path / "config.json")
    assert read_auto_map(tmp_path / "again/config.json") is None


def test_an_entry_of_another_repository_is_replaced_and_one_of_the_user_stays(saved, tmp_path):
    config = copy.deepcopy(saved[0].config)
    (tmp_path / "mine.py").touch()
    config.auto_map = {
        "AutoConfig": "somebody/else--configuration.SparseCutConfig",
        "AutoModel": "gone.Model",
        "AutoModelForCausalLM": "mine.Model",
    }
    config.save_pretrained(tmp_path)
    expected = read_auto_map(saved[2] / "config.json")
    assert read_auto_map(tmp_path / "config.json") == {
        **expected,
        "AutoModelForCausalLM": "mine.Model",
    }


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "plan", ["llava", {"method": "sparsecut", "gate": "one"}], ids=["llava", "gated"]
)
def test_loading_gives_back_the_same_model(tmp_path, plan, tie):
    model, processor = tiny_model(plan, language=tiny_language(tie=tie))
    with torch.no_grad():
        for p in model.fusion.parameters():
            p.add_(0.01)
    save(model, processor, tmp_path)
    for again in (load(tmp_path)[0], AutoModelForImageTextToText.from_pretrained(tmp_path)):
        assert torch.equal(run_probe(again)["logits"], run_probe(model)["logits"])
        assert all(
            torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True)
        )
        assert again.plan == model.plan and again.generation_config.suppress_tokens == [
            model.config.image_token_id
        ]
        head, table = again.get_output_embeddings().weight, again.get_input_embeddings().weight
        assert (head.data_ptr() == table.data_ptr()) == tie
    image, text = Image.new("RGB", (30, 20), (250, 80, 10)), "<image> what is it"
    for again in (load(tmp_path)[1], AutoProcessor.from_pretrained(tmp_path)):
        for name, value in processor(images=image, text=text, return_tensors="pt").items():
            assert torch.equal(again(images=image, text=text, return_tensors="pt")[name], value)
        assert (
            again.tokenizer.padding_side == "left"
            and again.chat_template == processor.chat_template
        )


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_the_file_holds_every_weight_once(tmp_path, tie):
    model, processor = tiny_model(language=tiny_language(tie=tie))
    save(model, processor, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters <= set(stored) and ("language_model.lm_head.weight" in stored) != tie
    assert (
        sum(torch.Size(s).numel() for name, s in stored.items() if name in parameters)
        == model.num_parameters()
    )


def test_weights_missing_from_the_file_are_drawn_like_new_ones_for_who_asks_for_them(tmp_path):
    model, processor = tiny_model({"method": "sparsecut", "gate": "zero"})
    save(model, processor, tmp_path)
    weights = {
        k: v
        for k, v in load_file(tmp_path / "model.safetensors").items()
        if not k.startswith("fusion.")
    }
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {name for name in model.state_dict() if name[:7] == "fusion."}
    assert not again.fusion.gates.any()
    for path in again.fusion.paths:
        for linear in (path.linear_1, path.linear_2):
            bound = linear.in_features**-0.5
            assert (
                0.8 * bound < linear.weight.abs().max() <= bound
                and linear.bias.abs().max() <= bound
            )
    assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)


def test_a_model_can_be_loaded_in_half_precision(saved):
    model, _ = load(saved[2], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = run_probe(model)["logits"].float()
    torch.testing.assert_close(logits, run_probe(saved[0])["logits"], atol=0.1, rtol=0.1)


def test_a_processor_of_an_unknown_class_is_never_handed_out_as_its_tokenizer(tmp_path):
    base, base_processor = build_example_base("llava")
    base_processor.__class__ = type("ForeignProcessor", (type(base_processor),), {})
    save(*upgrade(base, processor=base_processor), tmp_path)
    auto_map = read_auto_map(tmp_path / "processor_config.json")
    assert auto_map["AutoProcessor"].endswith(".ForeignProcessor")
    for trust, error in ((False, ValueError), (True, OSError)):
        with pytest.raises(error):
            AutoProcessor.from_pretrained(tmp_path, trust_remote_code=trust)
    with pytest.raises(UserError, match="processor"):
        load(tmp_path)


def test_images_of_any_size_are_saved_with_all_their_code(tmp_path):
    parts = {"image_processor": CLIPImageProcessorPil(), "tokenizer": tiny_tokenizer()}
    model, processor = build(tiny_vision(), tiny_language(), coarse="native", **parts)
    save(model, processor, tmp_path)
    image, text = Image.new("RGB", (60, 20), (250, 80, 10)), "<image> what"
    expected = processor(images=image, text=text, return_tensors="pt")
    absent = ABSENT + PROBE_NATIVE.format(folder=str(tmp_path))
    with torch.no_grad():
        save_file({"logits": model(**expected).logits}, tmp_path / "expected")
    run_in_fresh_process(absent, tmp_path)
