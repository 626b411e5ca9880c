"""Files are replaced at once, and what a killed process left of one is removed."""

import os
import subprocess
import sys
import time

from sparsecut.schema import SECONDS_TO_WRITE, write_text_file


def test_a_file_is_replaced_at_once_and_a_link_stays_one(tmp_path):
    file, link = tmp_path / "a.json", tmp_path / "link.json"
    assert write_text_file(file, "old") == file
    link.symlink_to(file)
    with file.open() as reader:
        assert write_text_file(link, "new") == link
        assert reader.read() == "old", "a reader keeps what it has opened"
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_parts_that_a_killed_process_left_are_removed_and_no_others(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    names = {
        "gone": f"a.json.{process.pid}.part",
        "living": f"a.json.{os.getppid()}.part",
        "other": f"b.json.{process.pid}.part",
    }
    long_ago = time.time() - 2 * SECONDS_TO_WRITE
    for name in names.values():
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (long_ago, long_ago))
    write_text_file(tmp_path / "a.json", "whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.json", names["living"], names["other"]}


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_text_file(pipe, "text\n")
    assert reader.communicate()[0] == "text\n"
    assert pipe.is_fifo()
