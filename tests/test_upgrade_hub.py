"""An upgraded model in pipelines, on the hub, without this package, and under a plain Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.fixture(scope="module")
def upgraded():
    """(model, processor): no test here changes them."""
    return upgraded_with_processor()


def test_a_pipeline_takes_the_model_and_its_folder(upgraded, tmp_path):
    model, processor = upgraded
    save(model, processor, tmp_path)
    prompt = encode_messages(processor)
    new_ids = model.generate(**prompt, **SHORT)[0, prompt["input_ids"].shape[1] :]
    expected = processor.decode(new_ids, skip_special_tokens=True)
    for source in ({"model": model, "processor": processor}, {"model": str(tmp_path)}):
        ask = pipeline("image-text-to-text", **source)
        conversations = [image_messages(), image_messages()]
        answers = ask(text=conversations, return_full_text=False, generate_kwargs=SHORT)
        assert [answer[0]["generated_text"] for answer in answers] == [expected] * 2


class FakeHub:
    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})


class FakeCard:
    def save(self, path):
        Path(path).write_text("card")


def test_a_push_to_the_hub_uploads_a_whole_model(upgraded, tmp_path, monkeypatch):
    def copy_files(self, folder, repo_id, *args, **kwargs):
        for path in Path(folder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())

    for module in ("saved_model", "processing_upgraded"):  # the hub is switched off in tests
        monkeypatch.setattr(f"sparsecut.{module}.check_hub_answers", lambda *args: None)
    monkeypatch.setattr(hub, "hf_api", FakeHub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: FakeCard())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", copy_files)
    for part in upgraded:
        part.push_to_hub("somebody/upgraded")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= names

    model, processor = upgraded
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    inputs = encode_messages(AutoProcessor.from_pretrained(tmp_path))
    expected = get_logits(model, encode_messages(processor))
    assert torch.equal(get_logits(loaded, inputs), expected)


WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sparsecut":
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Absent())
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder, problem in (("coded", "trust_remote_code=True"), ("plain", "sparsecut_upgrade")):
    try:
        AutoModelForImageTextToText.from_pretrained(folder)
    except ValueError as error:
        assert problem in str(error), error
    else:
        raise SystemExit(folder + " was loaded")

def read(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image = Image.radial_gradient("L").convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is it"}]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.equal(model(**inputs).logits, load_file("expected")["logits"])
    assert "sparsecut" not in sys.modules
    return model, processor, inputs

model, processor, inputs = read("coded")
model.generate(**inputs, max_new_tokens=3)
model.save_fusion("shortcuts")
for part in (model, processor):
    part.save_pretrained("again")
read("again")
"""


def test_a_folder_with_its_code_needs_no_package_and_one_without_is_refused(upgraded, tmp_path):
    model, processor = upgraded
    save(model, processor, tmp_path / "coded")
    save(model, processor, tmp_path / "plain", code=False)
    assert not list((tmp_path / "plain").glob("*.py"))
    logits = get_logits(model, encode_messages(processor))
    save_file({"logits": logits.contiguous()}, tmp_path / "expected")
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / "shortcuts" / "fusion.json").read_text())
    assert facts["plan"] == model.plan.to_dict()


def make_trainer(model, rows, folder):
    """A plain Trainer of Hugging Face: two rows per step, eight steps, the fusion trained."""
    model.requires_grad_(False)
    model.fusion.requires_grad_(True)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=4,
        max_steps=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=rows)


def test_a_plain_trainer_trains_saves_and_goes_on(tmp_path):
    model, inputs, _ = tiny_upgraded()
    rows = []
    for i in range(16):
        row = {name: value[i % 2] for name, value in inputs.items()}
        rows.append(row | {"labels": row["input_ids"]})
    trainer = make_trainer(model, rows, tmp_path)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.97 * losses[0]

    resumed = tiny_upgraded()[0]
    resumed_trainer = make_trainer(resumed, rows, tmp_path)
    resumed_trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    expected = model.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-8").eval()
    assert torch.equal(get_logits(loaded, inputs), get_logits(model.eval(), inputs))
