"""An upgraded model in pipelines, on the hub, without this package, and under a plain Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from helpers.ecosystem import (
    SHORT,
    encode_messages,
    get_logits,
    image_messages,
    tiny_upgraded,
    upgraded_with_processor,
)
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import hub

from sparsecut.building import save


def test_a_pipeline_takes_the_model_and_its_folder(tmp_path):
    model, processor = upgraded_with_processor()
    save(model, processor, tmp_path)
    prompt = encode_messages(processor)
    written = model.generate(**prompt, **SHORT)[0, prompt["input_ids"].shape[1] :]
    want = processor.decode(written, skip_special_tokens=True)
    for source in ({"model": model, "processor": processor}, {"model": str(tmp_path)}):
        ask = pipeline("image-text-to-text", **source)
        answers = ask(
            text=[image_messages(), image_messages()], return_full_text=False, generate_kwargs=SHORT
        )
        assert [answer[0]["generated_text"] for answer in answers] == [want] * 2


def test_what_is_pushed_to_the_hub_is_a_whole_model(tmp_path, monkeypatch):
    model, processor = upgraded_with_processor()
    prompt = encode_messages(processor)

    def keep(self, folder, repo_id, *args, **kwargs):
        for path in Path(folder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    monkeypatch.setattr(hub, "hf_api", Hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", keep)
    model.push_to_hub("somebody/upgraded")
    processor.push_to_hub("somebody/upgraded")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = encode_messages(AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(get_logits(again, inputs), get_logits(model, prompt))


REMOTE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from safetensors.torch import load_file
from PIL import Image
for folder, sentence in (("coded", "trust_remote_code=True"), ("plain", "does not recognize this architecture")):
    try:
        AutoModelForImageTextToText.from_pretrained(folder)
        raise SystemExit(folder + " was loaded")
    except ValueError as error:
        assert sentence in str(error), error
def read(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "image": Image.radial_gradient("L").convert("RGB")}, {"type": "text", "text": "what is it"}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([[{"role": "user", "content": content}]], **how)
    assert torch.equal(model(**inputs).logits, load_file("expected")["logits"]) and "sparsecut" not in sys.modules
    return model, processor, inputs
model, processor, inputs = read("coded")
model.generate(**inputs, max_new_tokens=3)
model.save_fusion("shortcuts")
for part in (model, processor):
    part.save_pretrained("again")
read("again")
"""


def test_a_folder_with_its_code_needs_no_package_and_one_without_is_refused(tmp_path):
    model, processor = upgraded_with_processor()
    save(model, processor, tmp_path / "coded", code=True)
    save(model, processor, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    save_file(
        {"logits": model(**encode_messages(processor)).logits.detach().contiguous()},
        tmp_path / "expected",
    )
    settings = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    settings.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", REMOTE]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    weights = json.loads((tmp_path / "shortcuts" / "fusion.json").read_text())
    assert weights["plan"] == model.plan.to_dict()


def trainer(model, rows, folder, **more):
    """A plain Trainer of Hugging Face over rows, two at a time, for eight steps."""
    settings = {
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 4,
        "max_steps": 8,
    }
    arguments = TrainingArguments(folder, report_to=[], disable_tqdm=True, use_cpu=True, **settings)
    return Trainer(model, arguments, train_dataset=rows)


def test_a_plain_trainer_trains_saves_and_goes_on(tmp_path):
    model, inputs, _ = tiny_upgraded()
    rows = [{name: value[i % 2] for name, value in inputs.items()} for i in range(16)]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    models = model, tiny_upgraded()[0]
    for one in models:
        one.requires_grad_(False)
        one.fusion.requires_grad_(True)
    whole, resumed = (trainer(one, rows, tmp_path) for one in models)
    whole.train()
    losses = [line["loss"] for line in whole.state.log_history if "loss" in line]
    assert losses[-1] < 0.97 * losses[0]
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for p, q in zip(*(one.state_dict().values() for one in models), strict=True):
        assert torch.equal(p, q)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-8").eval()
    assert torch.equal(get_logits(again, inputs), get_logits(model.eval(), inputs))
