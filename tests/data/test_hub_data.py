"""Data sets of the hub by name, against an imitation of it in another process's environment."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from helpers.hub import COMMIT, serve_hub
from helpers.runs import interrupt, log, recipe, run, stage
from helpers.shards import write_shards
from huggingface_hub import constants

from sparsecut import hub as hub_module
from sparsecut.building import build
from sparsecut.config.source import Source
from sparsecut.data.examples import read_source
from sparsecut.data.locating import find_hub_layout, find_revision
from sparsecut.profiling.dry_run_data import read_record_facts
from sparsecut.schema import UserError

TESTS = Path(__file__).parents[1]
# Reads sources that come as JSON on a line each, and answers each with a line.
READER = """
import json, sys
from sparsecut.config.source import Source
from sparsecut.data.locating import find_revision
from sparsecut.data.examples import Example, read_source
from sparsecut.data.streaming import read_stream
from sparsecut.schema import UserError

def read(keys):
    streaming = keys.pop("streaming", False)
    source = Source(**keys, streaming=streaming)
    examples = list(read_stream(source)) if streaming else read_source(source, [])
    sizes = [[image.size for image in example.load_images()] for example in examples]
    places = [example.place for example in examples]
    return {"ids": [e.id for e in examples], "sizes": sizes, "places": places, "revision": find_revision(source)}

for line in sys.stdin:
    try:
        answer = read(json.loads(line))
    except UserError as error:
        answer = {"error": str(error)}
    print("ANSWER", json.dumps(answer), flush=True)
"""


class Reader:
    """A process that reads sources with an environment of its own."""

    def __init__(self, home: Path, endpoint: str, **environment: str):
        variables = {
            **os.environ,
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        )

    def read(self, path: str, **keys) -> dict:
        """The answer to a source."""
        self.process.stdin.write(json.dumps({"path": path, **keys}) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError("the reader has ended")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with me/tables (two configurations), me/lines (images beside it) and me/pets."""
    root = tmp_path_factory.mktemp("hub")
    made = tmp_path_factory.mktemp("made")
    write_shards(made)
    tables, lines, pets = (root / "datasets" / "me" / name for name in ("tables", "lines", "pets"))
    for folder in (tables / "data", lines / "images", pets / "train" / "cat"):
        folder.mkdir(parents=True)
    saved = datasets.load_from_disk(str(made / "saved"))
    for number in range(2):
        shard = tables / "data" / f"train-0000{number}-of-00002.parquet"
        saved.shard(2, number, contiguous=True).to_parquet(shard)
    saved.select(range(3)).to_parquet(tables / "data" / "test-00000-of-00001.parquet")
    (tables / "more.jsonl").write_text((made / "part-0.jsonl").read_text())
    configs = (
        "---\nconfigs:\n- config_name: pictures\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n  - split: test\n    path: data/test-*\n"
        "- config_name: more\n  data_files: more.jsonl\n---\n"
    )
    (tables / "README.md").write_text(configs)
    record = json.loads((made / "data.json").read_text())[0]
    texts = [
        json.dumps({**record, "image": "images/0.png"}),
        json.dumps({**record, "image": "x.png"}),
    ]
    (lines / "train.jsonl").write_text("\n".join(texts))
    for target in (lines / "images" / "0.png", pets / "train" / "cat" / "0.png"):
        target.write_bytes((made / "0.png").read_bytes())
    for name in ("secret", "asked"):
        (root / "datasets" / "me" / name).mkdir()
        (root / "datasets" / "me" / name / "train.jsonl").write_text("\n".join(texts))
    with serve_hub(root) as server:
        server.private.add("me/secret")
        server.gated.add("me/asked")
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def reader(hub, home):
    reader = Reader(home, hub.url)
    yield reader
    reader.close()


def test_a_data_set_by_name_configuration_and_split(hub, reader):
    answer = reader.read("me/tables", name="pictures", split="train")
    assert len(answer["ids"]) == 12 and answer["sizes"][0] == [[16, 20]]
    assert answer["revision"] == COMMIT
    streamed = reader.read("me/tables", name="pictures", split="test", streaming=True)
    assert streamed["ids"] == answer["ids"][:3] and streamed["sizes"] == answer["sizes"][:3]
    assert streamed["places"][0].startswith("me/tables/data/test-00000-of-00001.parquet")


def test_images_beside_records_are_fetched_one_by_one(hub, reader):
    hub.requests.clear()
    answer = reader.read("me/lines", on_error="skip")
    assert answer["sizes"] == [[[16, 20]]]
    assert [r for r in hub.requests if r.startswith("GET") and r.endswith("0.png")]
    assert "me/lines/train.jsonl line 2" in reader.read("me/lines")["error"]
    pets = reader.read("me/pets", question="What is it?")
    assert pets["ids"] == ["train/cat/0.png"] and pets["sizes"] == [[[16, 20]]]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"path": "me/tables"}, ["pictures, more", "`name`"]),
        ({"path": "me/tables", "name": "picture"}, ["did you mean 'pictures'"]),
        ({"path": "me/tables", "name": "pictures"}, ["train, test", "`split`"]),
        ({"path": "me/tables", "name": "pictures", "split": "tran"}, ["did you mean 'train'"]),
        ({"path": "me/nothing"}, ["me/nothing", "hf auth login", "no folder"]),
        ({"path": "me/secret"}, ["me/secret", "hf auth login"]),
        ({"path": "me/asked"}, ["me/asked", "gated", "hf auth login"]),
        ({"path": "me/lines", "revision": "v2"}, ["'v2'", "revision"]),
        ({"path": "me/nothing.json"}, ["me/nothing.json", "file of records"]),
    ],
)
def test_what_is_not_there_is_told(reader, keys, wanted):
    error = reader.read(**keys)["error"]
    for part in wanted:
        assert part in error
    assert len(error) < 400


def test_without_a_hub_what_was_fetched_is_read(home, reader, monkeypatch):
    keys = {"name": "pictures", "split": "train"}
    before = reader.read("me/tables", **keys)
    assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    source = Source("me/tables", **keys)
    assert [example.id for example in read_source(source, [])] == before["ids"]
    assert find_revision(source) == COMMIT
    with pytest.raises(UserError, match=r"me/other.*switched off"):
        read_source(Source("me/other"), [])


def test_a_run_does_not_go_on_with_another_commit(home, reader, monkeypatch, tmp_path):
    """The branch moves between the run and its continuation, while the records stay the same."""
    reader.read("me/tables", name="pictures", split="test")
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    data = {"path": "me/tables", "name": "pictures", "split": "test"}
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    one = {**stage(tmp_path, args=args), "data": data}
    find_hub_layout.cache_clear()
    with interrupt("one", 1):
        run(tmp_path, one)
    moved = "b" * 40
    snapshots = home / "hub" / "datasets--me--tables" / "snapshots"
    (snapshots / moved).symlink_to(snapshots / COMMIT)
    for notes in (home / "sparsecut").glob("me--tables-*"):
        notes.write_text(notes.read_text().replace(COMMIT, moved))
    find_hub_layout.cache_clear()
    with pytest.raises(UserError, match=rf"{COMMIT}.*{moved}"):
        run(tmp_path, one, resume=True)
    for notes in (home / "sparsecut").glob("me--tables-*"):
        notes.write_text(notes.read_text().replace(moved, COMMIT))
    find_hub_layout.cache_clear()
    run(tmp_path, one, resume=True)
    assert log(tmp_path)[-1]["step"] == 2


def test_a_dry_run_fetches_no_data_set(tmp_path):
    one = {**stage(tmp_path), "data": {"path": "me/nowhere"}}
    facts = read_record_facts(recipe(tmp_path, one).stages[0])
    assert facts.number is None and any("me/nowhere" in note for note in facts.notes)


@pytest.fixture(params=["refused", "silent"])
def dead_end(request):
    """The address of a hub that refuses connections, or takes them and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_gives_no_answer_is_told_at_once(dead_end, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", dead_end)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "SECONDS_IN_ALL", 1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match=dead_end):
        read_source(Source("me/other"), [])
    with pytest.raises(UserError, match=r"vision model.*me/other"):
        build("me/other", "shapes")
    assert time.monotonic() - start < 5
    assert hub_module.SECONDS_TO_CONNECT < 10
