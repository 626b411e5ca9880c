"""A run is not continued with other records, images or models than it began with."""

import json
import shutil
import tarfile

import pytest
import torch
from helpers.runs import interrupt, log, recipe, run, stage, write_records
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.data.errors import RecordError
from sparsecut.schema import UserError
from sparsecut.training import run_inputs, stages
from sparsecut.training.run_dir import INPUTS

ARGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with records, and a run that was cut off after its first checkpoint."""
    made = write_records(tmp_path_factory.mktemp("runs"))
    start(made)
    return made


@pytest.fixture
def folder(made, tmp_path):
    """A copy of it: the folder has moved, and its files have new times."""
    return shutil.copytree(made, tmp_path / "moved", copy_function=shutil.copy)


def start(folder, **changes):
    with interrupt("one", step=3):
        run(folder, stage(folder, args=ARGS, **changes))


def go_on(folder, **changes):
    return run(folder, stage(folder, args=ARGS, **changes), resume=True)


def edit_records(folder, edit) -> None:
    file = folder / "data.json"
    records = json.loads(file.read_text())
    edit(records)
    file.write_text(json.dumps(records))


def change_answer(folder) -> str:
    edit_records(folder, lambda records: records[5]["conversations"][1].update(value="blue cat"))
    return "answers"


def change_order(folder) -> str:
    edit_records(folder, lambda records: records.reverse())
    return "records"


def add_record(folder) -> str:
    edit_records(folder, lambda records: records.append({**records[0], "id": "new"}))
    return "12 records and are 13"


def change_image(folder) -> str:
    """Another image of the same size, also in bytes."""
    file = folder / "5.png"
    size = file.stat().st_size
    with Image.open(file) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.putpixel((0, 0), (1, 2, 3))
    turned.save(file)
    assert file.stat().st_size <= size
    with file.open("ab") as end:  # what follows the last chunk is not read
        end.write(bytes(size - file.stat().st_size))
    return r"5\.png"


def change_large_image(folder) -> str:
    Image.new("RGB", (60, 60), "blue").save(folder / "2.png")
    return r"2\.png"


@pytest.mark.parametrize(
    "change", [change_answer, change_order, add_record, change_image, change_large_image]
)
def test_a_run_is_not_continued_with_other_data(folder, change):
    named = change(folder)
    before = (folder / "out" / "one" / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=named):
        go_on(folder)
    assert (folder / "out" / "one" / "log.jsonl").read_bytes() == before


def test_a_moved_folder_is_continued_to_the_bit(made, folder, tmp_path):
    """The recipe names other paths, and all files have other times."""
    resumed, _ = go_on(folder)
    whole, _ = run(made, stage(made, args=ARGS), output=str(tmp_path / "whole"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [line["step"] for line in log(folder)] == [1, 2, 3, 4]


def test_images_that_are_not_all_read_are_known_by_size_and_time(folder, monkeypatch, caplog):
    monkeypatch.setattr(run_inputs, "NUM_IMAGES", 0)
    shutil.rmtree(folder / "out")
    start(folder)
    change_image(folder)
    facts = json.loads((folder / "out" / INPUTS).read_text())
    go_on(folder)
    assert "images have other times" in caplog.text
    shutil.rmtree(folder / "out")
    start(folder)
    change_large_image(folder)
    with pytest.raises(UserError, match="sizes of images"):
        go_on(folder)
    assert facts["sources"]["stage one"][0]["contents"] == {}


def test_images_that_are_missing_are_left_out_as_ever(folder):
    (folder / "4.png").unlink()
    shutil.rmtree(folder / "out")
    with pytest.raises(RecordError, match=r"4\.png"):
        run(folder, stage(folder, args=ARGS))
    source = {"path": str(folder / "data.json"), "on_error": "skip", "max_broken": 1}
    given = {**stage(folder, args=ARGS), "data": source}
    with interrupt("one", step=3):
        run(folder, given)
    Image.new("RGB", (16, 20)).save(folder / "4.png")
    with pytest.raises(UserError, match="records"):
        run(folder, given, resume=True)


def test_images_in_an_archive_count_too(folder):
    def pack() -> None:
        with tarfile.open(folder / "images.tar", "w") as archive:
            for file in sorted(folder.glob("*.png")):
                archive.add(file, file.name)

    pack()
    shutil.rmtree(folder / "out")
    source = {"path": str(folder / "data.json"), "images": str(folder / "images.tar")}
    given = {**stage(folder, args=ARGS), "data": source}
    with interrupt("one", step=3):
        run(folder, given)
    change_image(folder)
    pack()
    with pytest.raises(UserError, match=r"5\.png"):
        run(folder, given, resume=True)


def test_files_of_a_stream_count_too(folder):
    records = json.loads((folder / "data.json").read_text())
    lines = [json.dumps(record) for record in records]
    (folder / "data.jsonl").write_text("\n".join(lines))
    shutil.rmtree(folder / "out")
    source = {"path": str(folder / "data.jsonl"), "streaming": True}
    given = {**stage(folder, args=ARGS), "data": source}
    with interrupt("one", step=3):
        run(folder, given)
    lines[5] = lines[5].replace("what", "whit")
    (folder / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"data\.jsonl"):
        run(folder, given, resume=True)


def test_records_that_are_evaluated_on_the_way_count_where_they_are(folder):
    shutil.rmtree(folder / "out")
    evaluate = {"data": {"path": str(folder / "texts.json")}}
    evaluated = {"eval_strategy": "steps", "eval_steps": 2}
    texts = folder / "texts.json"
    for args, refused, word in (({}, False, "it"), (evaluated, True, "what")):
        given = stage(folder, args={**ARGS, **args})
        with interrupt("one", step=3):
            run(folder, given, evaluate=evaluate, overwrite=True)
        texts.write_text(texts.read_text().replace(word, "a"))
        if refused:
            with pytest.raises(UserError, match="evaluate, data 0"):
                run(folder, given, evaluate=evaluate, resume=True)
        else:
            run(folder, given, evaluate=evaluate, resume=True)


def change_weights(model, processor) -> str:
    with torch.no_grad():
        next(model.vision_tower.parameters()).flatten()[7] += 0.5
    return "weights"


def change_template(model, processor) -> str:
    template = processor.chat_template or processor.tokenizer.chat_template
    processor.chat_template = template + " "
    return "chat template"


def change_pixels(model, processor) -> str:
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    return "image processor"


@pytest.mark.parametrize("change", [change_weights, change_template, change_pixels])
def test_a_run_is_not_continued_with_another_model(folder, change):
    model, processor = tiny_model()
    named = change(model, processor)
    given = recipe(folder, stage(folder, args=ARGS))
    with pytest.raises(UserError, match=f"model's {named}"):
        stages.train(given, model=model, processor=processor, shown=False, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"args": {**ARGS, "max_steps": 6}}, "stages"),
        ({"args": {**ARGS, "dataloader_drop_last": True}}, "stages"),
        ({"max_length": 100}, "stages"),
    ],
)
def test_a_run_is_not_continued_by_another_recipe(folder, changes, named):
    with pytest.raises(UserError, match=named):
        run(folder, {**stage(folder), **stage(folder, **changes)}, resume=True)


def test_a_run_without_facts_is_continued_where_its_recipe_names_the_same_paths(made, folder):
    """As of an older version, or after the user has removed the facts."""
    (folder / "out" / INPUTS).unlink()
    with pytest.raises(UserError, match="stages"):
        go_on(folder)
    change_answer(folder)
    config = folder / "out" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(folder)))
    go_on(folder)
