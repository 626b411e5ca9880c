"""A run's folder: nothing is lost unless the user says so, and nothing damaged is continued."""

import json
import shutil
import threading

import pytest
import torch
from helpers.runs import interrupt, log, run, stage, write_records

from sparsecut.config.folder_lock import OWNER, lock_folder
from sparsecut.schema import UserError
from sparsecut.training import checkpoints, run_dir

ARGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with records, a finished run in whole/, and one cut off at its end in cut/."""
    made = write_records(tmp_path_factory.mktemp("runs"))
    run(made, stage(made, args=ARGS), output=str(made / "whole"))
    with interrupt("one", step=3):
        run(made, stage(made, args={**ARGS, "save_steps": 1}), output=str(made / "cut"))
    return made


@pytest.fixture
def cut(made, tmp_path):
    """A copy of the run that was cut off, with checkpoints after every step."""
    return shutil.copytree(made / "cut", tmp_path / "out")


@pytest.fixture
def whole(made, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(made / "whole", tmp_path / "out")


def again(made, output, **changes):
    """Run the recipe of both runs on a folder."""
    args = {**ARGS, **changes.pop("args", {})}
    return run(made, stage(made, args=args), output=str(output), **changes)


def list_files(folder) -> dict[str, bytes]:
    """Name -> contents of all files but the lock."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_a_run_is_replaced_only_where_the_user_says_so(made, tmp_path, name):
    out = shutil.copytree(made / name, tmp_path / "out")
    before = list_files(out)
    with pytest.raises(UserError, match="--overwrite"):
        again(made, out)
    with pytest.raises(UserError, match=r"stages.*--overwrite"):
        again(made, out, args={"learning_rate": 1e-3})
    with pytest.raises(UserError, match="--resume, --overwrite"):
        again(made, out, resume=True, overwrite=True)
    assert list_files(out) == before


def test_what_is_replaced_is_ours_alone(made, whole):
    (whole / "thesis.txt").write_text("years of work")
    (whole / "one" / "notes.md").write_text("good run")
    shutil.copytree(whole / "one" / "checkpoint-2", whole / "one" / "checkpoint-2-good")
    kept = list_files(whole / "one" / "checkpoint-2-good")
    again(made, whole, args={"save_strategy": "no", "max_steps": 2}, overwrite=True)
    assert (whole / "thesis.txt").read_text() == "years of work"
    assert (whole / "one" / "notes.md").read_text() == "good run"
    assert list_files(whole / "one" / "checkpoint-2-good") == kept
    assert not (whole / "one" / "checkpoint-4").exists()
    assert [line["step"] for line in log(whole.parent)] == [1, 2]


def test_a_replaced_run_leaves_nothing_that_the_new_one_would_be_taken_for(made, tmp_path):
    """Its stages, adapters and final model are gone before the first step."""
    out = tmp_path / "out"
    stages = [stage(made, train=["fusion"]), stage(made, name="two", train=["language:lora"])]
    stages[1]["lora"] = {"merge": False, "r": 2}
    run(made, *stages, output=str(out))
    assert (out / "final" / "adapters").is_dir()
    with interrupt("one", step=1):
        run(made, stage(made), output=str(out), overwrite=True)
    assert not (out / "final").exists()
    assert not (out / "two").exists()
    model, _ = run(made, stage(made), output=str(out), resume=True)
    fresh, _ = run(made, stage(made), output=str(tmp_path / "fresh"))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert not (out / "final" / "adapters").exists()


@pytest.mark.parametrize("name", ["one", "final"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_ours_is_not_written_into(made, tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    (tmp_path / name / "model.safetensors").write_text("precious")
    before = list_files(tmp_path)
    with pytest.raises(UserError, match=name):
        again(made, tmp_path, overwrite=overwrite)
    assert list_files(tmp_path) == before


def test_a_config_that_is_no_recipe_is_left_alone(made, tmp_path):
    (tmp_path / "config.yaml").write_text("my: settings\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        again(made, tmp_path, overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "my: settings\n"


def test_a_run_that_took_no_step_may_be_started_again(made, tmp_path):
    with interrupt("one", step=0):
        again(made, tmp_path)
    again(made, tmp_path, args={"learning_rate": 1e-3})


def test_a_folder_that_is_in_use_is_refused_before_anything_is_read(made, whole):
    before = list_files(whole)
    held = threading.Event()
    ended = threading.Event()

    def hold():
        with lock_folder(whole):
            held.set()
            ended.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with pytest.raises(UserError, match="in use by process"):
        again(made, whole, resume=True)
    ended.set()
    thread.join()
    assert list_files(whole) == before
    assert not (whole / OWNER).exists()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


DAMAGES = {
    "missing": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "flipped": flip,
}
FILES = [
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "whole.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_offered(made, cut, file, kind):
    newest = cut / "one" / "checkpoint-3"
    DAMAGES[kind](newest / file)
    before = list_files(cut)
    with pytest.raises(UserError, match=r"checkpoint-3.*checkpoint-2") as caught:
        again(made, cut, resume=True)
    assert file in str(caught.value)
    assert list_files(cut) == before


@pytest.mark.parametrize("remedy", ["removed", "renamed"])
def test_the_one_before_gives_the_same_to_the_bit(made, cut, remedy):
    newest = cut / "one" / "checkpoint-3"
    if remedy == "removed":
        shutil.rmtree(newest)
    else:
        newest.rename(newest.with_name("checkpoint-3-damaged"))
    again(made, cut, resume=True)
    final = list_files(made / "whole")["final/model.safetensors"]
    assert list_files(cut)["final/model.safetensors"] == final
    assert newest.with_name("checkpoint-3-damaged").is_dir() == (remedy == "renamed")


@pytest.mark.parametrize("lost", [["optimizer.pt"], ["scheduler.pt"], ["rng_state.pth"]])
def test_an_old_checkpoint_that_lacks_a_file_is_refused(made, cut, lost):
    """Checkpoints written before hold no digests."""
    newest = cut / "one" / "checkpoint-3"
    facts = json.loads((newest / "whole.json").read_text())
    del facts["files"]
    (newest / "whole.json").write_text(json.dumps(facts))
    checkpoints.check_intact(newest)
    for name in lost:
        (newest / name).unlink()
    with pytest.raises(UserError, match=lost[0]):
        again(made, cut, resume=True)


def test_a_checkpoint_of_the_model_alone_is_not_continued(made, tmp_path):
    with interrupt("one", step=3):
        again(made, tmp_path, args={"save_only_model": True})
    with pytest.raises(UserError, match="save_only_model"):
        again(made, tmp_path, resume=True)


def rewrite(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": 2},
        {"global_step": "3"},
        {"max_steps": 8},
        {"max_steps": None},
        {"log_history": 5},
        {"stateful_callbacks": [1]},
        {"epoch": "x"},
        {"foreign": 1},
        {"train_batch_size": [1]},
    ],
)
def test_a_hostile_state_is_refused(made, cut, change):
    newest = cut / "one" / "checkpoint-3"
    rewrite(newest / "trainer_state.json", **change)
    facts = json.loads((newest / "whole.json").read_text())
    del facts["files"]
    (newest / "whole.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="checkpoint-3"):
        again(made, cut, resume=True)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("contents", [{}, [1], {"state": 5, "param_groups": 3}, torch.zeros(3)])
def test_torch_files_of_other_contents_are_refused(made, cut, file, contents):
    newest = cut / "one" / "checkpoint-3"
    torch.save(contents, newest / file)
    (newest / "whole.json").write_text('{"global_batch": 2, "processes": 1}')
    with pytest.raises(UserError, match="checkpoint-3"):
        again(made, cut, resume=True)


def test_old_checkpoints_are_removed_but_not_copies_of_them(tmp_path):
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        checkpoints.mark_begun(folder)
        checkpoints.mark_complete(folder, {})
    (tmp_path / "checkpoint-2-good").mkdir()
    best = "elsewhere/checkpoint-4"
    checkpoints.remove_old(tmp_path, None, None)
    assert len(checkpoints.find_checkpoints(tmp_path)) == 4
    checkpoints.remove_old(tmp_path, 3, best)
    assert list(checkpoints.find_checkpoints(tmp_path)) == [4, 6, 8]
    checkpoints.remove_old(tmp_path, 1, best)
    assert list(checkpoints.find_checkpoints(tmp_path)) == [4, 8]
    checkpoints.remove_old(tmp_path, 1, None)
    assert list(checkpoints.find_checkpoints(tmp_path)) == [8]
    assert (tmp_path / "checkpoint-2-good").is_dir()


def test_all_files_that_a_run_writes_are_known_as_ours(made, whole):
    """Or --overwrite would leave some of them."""
    run_dir.remove_run(whole, run_dir.read_previous(whole))
    assert set(list_files(whole)) == {"config.yaml"}
