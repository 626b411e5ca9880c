"""What records may reach: images inside the folder that the source names, and nothing else."""

import json
import os
import socket

import pytest
from helpers.records import make_record, make_turns, write_data

from sparsecut.config.recipe import Source
from sparsecut.data.access import Access
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example, read_examples, read_source
from sparsecut.data.images import ImageStore
from sparsecut.data.streaming import read_stream
from sparsecut.evaluation.tasks.task import open_images
from sparsecut.reports.compare import _embed
from sparsecut.schema import UserError


@pytest.fixture
def places(image_folder):
    """A folder of images beside one that is none of the records' business."""
    inside, outside = image_folder / "sub", image_folder / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes((image_folder / "a.png").read_bytes())
    (inside / "link.png").symlink_to(outside / "secret.png")
    (inside / "linked").symlink_to(outside)
    beside = image_folder / "sub beside"  # its name begins as the folder's does
    beside.mkdir()
    (beside / "secret.png").write_bytes((image_folder / "a.png").read_bytes())
    return inside, outside


def list_names(outside) -> dict[str, str]:
    return {
        "absolute": str(outside / "secret.png"),
        "up": "../outside/secret.png",
        "up and up": "linked/../sub/../outside/secret.png",
        "link": "link.png",
        "linked folder": "linked/secret.png",
        "beside": "../sub beside/secret.png",
        "beside, absolute": str(outside.parent / "sub beside" / "secret.png"),
    }


@pytest.mark.parametrize(
    "kind",
    ["absolute", "up", "up and up", "link", "linked folder", "beside", "beside, absolute"],
)
def test_images_outside_are_refused_unless_they_may_lie_anywhere(places, kind):
    name = list_names(places[1])[kind]
    path = str(
        write_data(places[0], make_record(id="good", image="b.png"), make_record(image=name))
    )
    with pytest.raises(RecordError, match=r"record 1: .*outside.*anywhere: true"):
        read_source(Source(path), [])
    problems = []
    (example,) = read_source(Source(path, on_error="skip"), problems)
    assert (example.id, len(problems)) == ("good", 1)
    streamed = [e for e in read_stream(Source(path)) if isinstance(e, Example)]
    with pytest.raises(RecordError, match="outside"):
        streamed[1].load_images()
    _, trusted = read_source(Source(path, anywhere=True), [])
    assert trusted.load_images()[0].size == (10, 12)
    assert _embed(name, [ImageStore(places[0])]) is None
    assert _embed(name, [ImageStore(places[0], Access(anywhere=True))]) is not None


def test_images_inside_are_found_however_they_are_named(places, monkeypatch, tmp_path_factory):
    inside, _ = places
    link = tmp_path_factory.mktemp("links") / "images"
    link.symlink_to(inside)
    (inside / "b2.png").symlink_to("b.png")
    for folder in (inside, link):
        names = ["b.png", "./b.png", "../sub/b.png", str(folder / "b.png"), str(inside / "b.png")]
        for name in [*names, "b2.png"]:
            assert ImageStore(folder).load(name).size == (10, 12), name
        path = write_data(inside.parent, make_record(image=str(inside / "b.png")))
        assert read_examples(path, folder)[0].load_images()
    monkeypatch.chdir(inside.parent)
    assert ImageStore("sub").load("b.png")
    monkeypatch.chdir(inside)
    assert ImageStore(".").load(str(inside / "b.png"))


def test_a_benchmark_s_folder_may_link_to_images_but_not_its_questions(places):
    inside, outside = places
    store = open_images(inside)
    assert "link.png" in store and "linked/secret.png" in store
    assert str(outside / "secret.png") not in store and "../outside/secret.png" not in store


@pytest.mark.parametrize("name", ["/proc/self/environ", "/proc/self/cmdline", "/sys/kernel/notes"])
def test_parts_of_the_system_are_never_read(image_folder, name):
    (image_folder / "link.png").symlink_to(name)
    for access in (Access(), Access(anywhere=True), Access(follows_links=True)):
        store = ImageStore(image_folder, access)
        for one in (name, "link.png", "../" * 20 + name):
            with pytest.raises(UserError):
                store.read_bytes(one)


def test_names_that_no_file_has_are_refused_with_their_name(image_folder):
    (image_folder / "loop.png").symlink_to("loop.png")
    for access in (Access(), Access(anywhere=True), Access(follows_links=True)):
        store = ImageStore(image_folder, access)
        for name in ("loop.png", "none.png", "a.png/b.png", "sub", "x" * 300, "\0.png", "\ud800"):
            assert name not in store
            with pytest.raises(UserError):
                store.load(name)
    assert str(image_folder / "a.png") in ImageStore("/")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_pipes_sockets_and_devices_are_no_images_and_no_records(image_folder, kind, monkeypatch):
    monkeypatch.chdir(image_folder)  # a socket's path must be short
    name = "x.json"
    if kind == "pipe":
        os.mkfifo(name)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    else:
        os.symlink("/dev/zero", name)
    for access in (Access(), Access(anywhere=True)):
        with pytest.raises(UserError):
            ImageStore(image_folder, access).load(name)
    with pytest.raises(UserError, match=name):
        read_examples(image_folder / name)
    with pytest.raises(UserError, match=name):
        ImageStore(image_folder / name)
    for suffix in (".tar", ".parquet", ".jsonl", ".arrow"):
        (image_folder / f"y{suffix}").symlink_to(name)
        with pytest.raises(UserError, match=f"y{suffix}"):
            read_examples(image_folder / f"y{suffix}")


def test_tables_reach_no_further(image_folder):
    datasets = pytest.importorskip("datasets")
    (image_folder / "sub" / "secret.png").write_bytes((image_folder / "a.png").read_bytes())
    image = {"bytes": None, "path": "../a.png"}
    turns = make_turns(("human", "<image> What?"), ("gpt", "cat"))
    table = datasets.Dataset.from_list([{"image": image, "conversations": turns}])
    table.to_parquet(image_folder / "sub" / "x.parquet")
    with pytest.raises(RecordError, match=r"record 0: .*outside"):
        read_examples(image_folder / "sub" / "x.parquet")
    access = Access(anywhere=True)
    (example,) = read_examples(image_folder / "sub" / "x.parquet", access=access)
    assert example.load_images()


def test_a_source_takes_the_settings_from_a_recipe(image_folder):
    path = write_data(image_folder, make_record())
    with pytest.raises(UserError, match="max_mib"):
        Source(str(path), max_mib=0)
    assert (
        json.loads(path.read_text())[0]["id"] == read_source(Source(str(path), max_mib=1), [])[0].id
    )
