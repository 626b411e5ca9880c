"""The twelve records of the tests' runs as files of every kind that is read."""

import csv
import io
import json
import tarfile
from pathlib import Path

import datasets
from helpers.runs import write_records


def write_shards(folder: Path) -> None:
    """Write data.json, texts.json and their images, and the same records in other kinds of files.

    These are part-N.jsonl, shard-N.tar, table.parquet, saved/ and images.tar.
    """
    write_records(folder)
    records = json.loads((folder / "data.json").read_text())
    for part in range(3):
        lines = [json.dumps(record) + "\n" for record in records[part::3]]
        (folder / f"part-{part}.jsonl").write_text("".join(lines))
        _write_archive(folder / f"shard-{part}.tar", records[part::3])
    with tarfile.open(folder / "images.tar", "w") as archive:
        for image in sorted(folder.glob("*.png")):
            archive.add(image, image.name)
    table = datasets.Dataset.from_list([_embed_images(folder, record) for record in records])
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "table.parquet")


def write_folders(folder: Path) -> None:
    """Write table.csv, splits/, album/, pets/ and clone/ beside what `write_shards` has written."""
    records = json.loads((folder / "data.json").read_text())
    saved = datasets.load_from_disk(str(folder / "saved"))
    datasets.DatasetDict(train=saved, test=saved.select(range(3))).save_to_disk(folder / "splits")
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "question", "answer"])
        for record in records:
            question, answer = (turn["value"] for turn in record["conversations"])
            names = record["image"] or []
            cell = json.dumps(names) if len(names) > 1 else "".join(names)
            writer.writerow([record["id"], cell, question, answer])
    for place in ("album", "pets/train/cat", "pets/train/dog", "clone/data"):
        (folder / place).mkdir(parents=True)
    lines = []
    for number, kind in ((0, "cat"), (1, "dog"), (2, "cat")):
        data = (folder / f"{number}.png").read_bytes()
        (folder / "album" / f"{number}.png").write_bytes(data)
        (folder / "pets" / "train" / kind / f"{number}.png").write_bytes(data)
        turns = records[number]["conversations"]
        lines.append(json.dumps({"file_name": f"{number}.png", "conversations": turns}) + "\n")
    (folder / "album" / "metadata.jsonl").write_text("".join(lines))
    saved.to_parquet(folder / "clone" / "data" / "train-00000-of-00001.parquet")
    configs = "---\nconfigs:\n- config_name: pictures\n  data_files: data/train-*\n---\n"
    (folder / "clone" / "README.md").write_text(configs)


def _write_archive(path: Path, records: list[dict]) -> None:
    """A WebDataset archive: KEY.json, KEY.0.png, KEY.1.png."""
    with tarfile.open(path, "w") as archive:
        for record in records:
            text = {key: value for key, value in record.items() if key != "image"}
            _add(archive, f"{record['id']}.json", json.dumps(text).encode())
            for i, name in enumerate(record["image"] or []):
                _add(archive, f"{record['id']}.{i}.png", (path.parent / name).read_bytes())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def _embed_images(folder: Path, record: dict) -> dict:
    images = []
    for name in record["image"] or []:
        images.append({"bytes": (folder / name).read_bytes(), "path": None})
    return {**record, "image": images}
