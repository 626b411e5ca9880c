"""The example of upgrading runs, in small. tests/conformance runs it with the other base."""

from helpers.example_bases import run_upgrade_example


def test_the_example_of_upgrading_prints_its_table(tmp_path, monkeypatch, capsys):
    run_upgrade_example("qwen", tmp_path, monkeypatch, capsys)
