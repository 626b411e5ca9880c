"""Replicas by Ray Serve: where Ray is installed, two of them answer, and one may die."""

import base64
import io
import json
import os
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from helpers.vllm_models import SETTINGS, save_vllm_model
from PIL import Image

import sparsecut

openai = pytest.importorskip("openai")
ray = pytest.importorskip("ray", reason="needs pip install 'sparsecut[ray]'")

from sparsecut.serving.ray import Settings, app  # noqa: E402

PORT = 8765
NUM_REQUESTS = 16
MESSAGES = [{"role": "user", "content": "what is it"}]


def make_request(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), color).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what color is it ?"},
    ]
    messages = [{"role": "user", "content": parts}]
    settings = {"model": "cats", "max_tokens": 200, "temperature": 0}
    return json.dumps({"messages": messages, **settings}).encode()


def ask(body: bytes) -> str | int:
    """The answer, or the status of a failure."""
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{PORT}/v1/chat/completions"
    try:
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code


def find_replicas() -> list[psutil.Process]:
    replicas = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "ServeReplica" in command:
            replicas.append(process)
    return replicas


def find_servers(folder) -> list[psutil.Process]:
    """Processes of vLLM's server for a model."""
    servers = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(folder) in command and command[1:2] == ["-m"]:
            servers.append(process)
    return servers


@pytest.fixture
def cluster():
    os.environ.update(SETTINGS)  # of vLLM on CPUs; Ray's processes inherit them
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    ray.serve.shutdown()
    ray.shutdown()


def save_model(folder, engine: str) -> dict:
    """Save a model that an engine serves; returns the application's settings for it."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed")
        save_vllm_model(folder)
        words = "--gpu-memory-utilization 0.1 --enforce-eager --max-model-len 512"
        return {"engine": "vllm", "max_batch": 4, "engine_args": words}
    model, processor = sparsecut.build("shapes", "shapes", "sparsecut")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {}


@pytest.mark.parametrize("engine", ["local", "vllm"])
def test_a_replica_that_dies_loses_no_request_of_the_other(cluster, tmp_path, engine):
    folder = tmp_path / "cats" / "final"
    settings = save_model(folder, engine)
    # Texts by name, as `serve run` gives them.
    ray.serve.run(app({"model": str(folder), "replicas": "2", "cpus": "1", **settings}))
    with openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["cats"]
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="cats", messages=MESSAGES, temperature=9)
        create = client.chat.completions.create
        chunks = create(model="cats", messages=MESSAGES, stream=True, max_tokens=9)
        assert len(list(chunks)) > 2
    body = make_request("red")
    expected = ask(body)
    assert isinstance(expected, str)
    replicas = find_replicas()
    assert len(replicas) == 2
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = [pool.submit(ask, body) for _ in range(NUM_REQUESTS)]
        os.kill(replicas[0].pid, signal.SIGKILL)
        answers = [answer.result() for answer in answers]
    # What the dead one had is lost, at most; all others are answered, and so is what comes later.
    assert answers.count(expected) >= 1
    assert set(answers) <= {expected, 500, 503}
    assert [ask(body) for _ in range(8)] == [expected] * 8
    if engine == "vllm":
        ray.serve.shutdown()
        deadline = time.monotonic() + 60
        while find_servers(folder):  # that of the killed replica as well
            assert time.monotonic() < deadline
            time.sleep(0.5)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="max_replicas"):
        Settings(model="x", replicas=3, max_replicas=2)
    with pytest.raises(ValueError, match="replica"):
        Settings(model="x", replica=2)
    with pytest.raises(sparsecut.schema.UserError, match="nowhere"):
        app(Settings(model="/nowhere/at/all"))
    with pytest.raises(sparsecut.schema.UserError, match="nowhere"):
        app({"model": "/nowhere/at/all", "replicas": "2"})
    with pytest.raises(ValueError, match="engine=vllm"):
        Settings(model="x", engine_args="--max-num-seqs 3")
    with pytest.raises(ValueError, match="allowed_hosts"):
        Settings(model="x", engine="vllm", allowed_hosts="a.example")
    assert Settings(model="x", allowed_hosts="a.example b.example").allowed_hosts[1] == "b.example"
