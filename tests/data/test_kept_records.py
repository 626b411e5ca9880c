"""Records that a process reads once for many runs are the same as when they are read anew."""

import json

import pytest
from helpers.runs import write_records

from sparsecut.config.recipe import Source
from sparsecut.data import examples
from sparsecut.data.examples import read_source
from sparsecut.data.kept_records import KEPT, keep_records


@pytest.fixture
def reads(monkeypatch) -> list:
    """The calls that have read files."""
    calls = []
    read = examples.read_examples

    def count(*args, **settings):
        calls.append(args)
        return read(*args, **settings)

    monkeypatch.setattr(examples, "read_examples", count)
    return calls


def test_other_choices_of_the_same_files_read_them_once(tmp_path, reads):
    write_records(tmp_path)
    path = str(tmp_path / "data.json")
    sources = [Source(path), Source(path, keep=2), Source(path, text_only=True, group="(.)")]
    expected = [read_source(source, []) for source in sources]
    reads.clear()
    with keep_records():
        kept = [read_source(source, []) for source in sources]
    assert kept == expected
    assert len(reads) == 1
    assert not KEPT
    read_source(sources[0], [])
    assert len(reads) == 2, "nothing is kept outside"


def test_a_file_that_has_changed_is_read_again(tmp_path, reads):
    write_records(tmp_path)
    path = tmp_path / "data.json"
    with keep_records():
        before = read_source(Source(str(path)), [])
        records = json.loads(path.read_text())
        path.write_text(json.dumps(records[:-1]))
        after = read_source(Source(str(path)), [])
    assert len(after) == len(before) - 1


@pytest.mark.parametrize("keys", [{"max_mib": 64}, {"anywhere": True}, {"on_error": "skip"}])
def test_what_reads_otherwise_is_read_for_itself(tmp_path, reads, keys):
    write_records(tmp_path)
    path = str(tmp_path / "data.json")
    with keep_records():
        read_source(Source(path), [])
        read_source(Source(path, **keys), [])
    assert len(reads) == 2


def test_changing_a_list_that_was_given_changes_nothing_that_is_kept(tmp_path):
    write_records(tmp_path)
    source = Source(str(tmp_path / "data.json"))
    with keep_records():
        whole = len(read_source(source, []))
        read_source(source, []).clear()
        assert len(read_source(source, [])) == whole
