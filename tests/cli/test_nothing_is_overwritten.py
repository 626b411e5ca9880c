"""What a command has made is replaced only where the user says so; one process has a folder."""

import json
import threading

import pytest
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.folder_lock import claim_new_folder, lock_folder
from sparsecut.experiments.search import _check_earlier
from sparsecut.schema import UserError

BUILD = ["build", "--vision", "shapes", "--language", "shapes", "--plan", "llava", "--out"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def test_a_built_model_is_not_replaced_and_holds_no_lock(tmp_path):
    out = tmp_path / "model"
    assert run(*BUILD, out).exit_code == 0
    assert not [path.name for path in out.iterdir() if "lock" in path.name]
    with pytest.raises(UserError, match="model already"):
        run(*BUILD, out)


@pytest.mark.parametrize(
    "words", [BUILD, ["shapes", "pretrain", "--quick", "--out"], ["shapes", "draw"]]
)
def test_the_second_process_on_a_folder_is_refused(tmp_path, words):
    errors = []

    def try_it():
        try:
            run(*words, tmp_path / "new")
        except UserError as error:
            errors.append(str(error))

    with lock_folder(tmp_path / "new"):
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "in use" in errors[0]
    assert not (tmp_path / "new").exists()


def test_a_claim_that_wrote_nothing_leaves_nothing(tmp_path):
    with claim_new_folder(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_trained_backbones_and_numbers_stay(tmp_path):
    for part in ("vision", "language"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        run("shapes", "pretrain", "--quick", "--out", tmp_path)
    numbers = tmp_path / "numbers.json"
    numbers.write_text("[]")
    with pytest.raises(UserError, match=r"numbers\.json"):
        run("shapes", "point", tmp_path / "vision", "--out", numbers)
    assert numbers.read_text() == "[]"


def test_an_explanation_of_another_model_stays(tmp_path):
    earlier = json.dumps({"conditions": {}, "shortcuts": [], "model": "other"})
    (tmp_path / "explain.json").write_text(earlier)
    (tmp_path / "q.json").write_text("[]")
    words = ("explain", tmp_path, "--data", tmp_path / "q.json", "--out", tmp_path)
    with pytest.raises(UserError, match="other"):
        run(*words)
    with pytest.raises(UserError, match=r"config\.json"):  # the next check
        run(*words, "--overwrite")


def test_the_plan_of_a_search_with_another_budget_stays(tmp_path):
    file = tmp_path / "search.json"
    file.write_text(json.dumps({"count": 4, "ratio": None}))
    _check_earlier(file, {"count": 4, "ratio": None}, overwrite=False)
    _check_earlier(file, {"count": 8, "ratio": None}, overwrite=True)
    with pytest.raises(UserError, match="count 4"):
        _check_earlier(file, {"count": 8, "ratio": None}, overwrite=False)
