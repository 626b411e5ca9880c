"""The twelve records of the tests' runs as files of every kind that is read."""

import io
import json
import tarfile

import datasets
from helpers.runs import write_records


def write_shards(folder) -> None:
    """data.json, texts.json and their pictures; part-N.jsonl, shard-N.tar, table.parquet, saved/
    and pictures.tar hold the same.
    """
    write_records(folder)
    records = json.loads((folder / "data.json").read_text())
    for part in range(3):
        lines = "".join(json.dumps(record) + "\n" for record in records[part::3])
        (folder / f"part-{part}.jsonl").write_text(lines)
        with tarfile.open(folder / f"shard-{part}.tar", "w") as archive:
            for record in records[part::3]:
                text = json.dumps({k: v for k, v in record.items() if k != "image"}).encode()
                members = {f"{record['id']}.json": text}
                for i, name in enumerate(record["image"] or []):
                    members[f"{record['id']}.{i}.png"] = (folder / name).read_bytes()
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    with tarfile.open(folder / "pictures.tar", "w") as archive:
        for picture in sorted(folder.glob("*.png")):
            archive.add(picture, picture.name)
    rows = [
        {
            **r,
            "image": [{"bytes": (folder / n).read_bytes(), "path": None} for n in r["image"] or []],
        }
        for r in records
    ]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "table.parquet")
