"""Replicas by Ray Serve: where Ray is installed, two of them answer, and one may die."""

import base64
import io
import json
import os
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image

import sparsecut

ray = pytest.importorskip("ray", reason="needs pip install 'sparsecut[ray]'")

from sparsecut.serving.ray import Settings, app  # noqa: E402

PORT = 8765
NUM_REQUESTS = 16


def make_request(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48, 48), color).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what color is it ?"},
    ]
    messages = [{"role": "user", "content": parts}]
    return json.dumps({"messages": messages, "max_tokens": 200, "temperature": 0}).encode()


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


@pytest.fixture
def served(tmp_path):
    model, processor = sparsecut.build("shapes", "shapes", "sparsecut")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    ray.serve.run(app(Settings(model=str(folder), replicas=2, cpus=1)))
    yield
    ray.serve.shutdown()
    ray.shutdown()


def test_a_replica_that_dies_loses_no_request_of_the_other(served):
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


def test_settings_are_checked():
    with pytest.raises(ValueError, match="max_replicas"):
        Settings(model="x", replicas=3, max_replicas=2)
    with pytest.raises(ValueError, match="replica"):
        Settings(model="x", replica=2)
    with pytest.raises(sparsecut.schema.UserError, match="nowhere"):
        app(Settings(model="/nowhere/at/all"))
