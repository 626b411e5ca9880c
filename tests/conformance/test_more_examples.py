"""The example of upgrading with a base of one view per image, which has one more control."""

from helpers.example_bases import run_upgrade_example


def test_the_example_of_upgrading_prints_its_table(tmp_path, monkeypatch, capsys):
    run_upgrade_example("llava", tmp_path, monkeypatch, capsys)
