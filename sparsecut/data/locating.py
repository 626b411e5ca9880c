"""From a source of a recipe to its files: patterns, saved data sets, folders, repositories."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..config.source import Source, looks_like_dataset_name
from ..config.yaml_io import expand_path
from ..hub import (
    HubUnreachable,
    describe_gated,
    describe_switched_off,
    find_dataset_notes,
    find_on_hub,
    is_offline,
)
from ..schema import UserError, nearest, write_text_file
from .class_labels import ClassNames, find_class_names
from .hub_files import Remote
from .readers import SHOWN_SUFFIXES, find_files, holds_records
from .record_files import LabelledImage, MetadataFile, RecordFile

SAVED = "dataset_info.json"  # of a folder that `Dataset.save_to_disk` has written
SAVED_STATE = "state.json"  # beside it; other tools have files of the first name
SAVED_SPLITS = "dataset_dict.json"  # of one that `DatasetDict.save_to_disk` has written
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Kinds of data sets, as `datasets` tells them by their files, whose files hold records.
RECORD_KINDS = ("json", "csv", "parquet", "arrow", "webdataset")
IMAGE_KIND = "imagefolder"
KEYS = ("name", "split", "revision")  # of a source, which choose inside of a data set


class Layout(NamedTuple):
    """The files of a folder or repository, as `datasets` tells them.

    Attributes:
        kind: What they hold, one of `RECORD_KINDS` or `IMAGE_KIND`, or something else.
        splits: Name of a split -> its files.
        classes: Names of the classes in columns of numbers, where a README.md has them.
    """

    kind: str
    splits: dict[str, list[str]]
    classes: dict[str, list[str]]


def find_record_files(source: Source) -> list[RecordFile]:
    """Return the files that a source names, in order.

    Raises:
        UserError: Something is missing, holds no records, or has several splits of which none is
            chosen.
    """
    path = Path(expand_path(source.path))
    if is_dataset_name(str(path)):
        return _find_hub_files(source)
    if not _is_folder(path):
        _refuse_keys(source, KEYS, "it names files")
        return [RecordFile(file) for file in find_files(path)]
    _refuse_keys(source, ("revision",), "it is a folder on this machine")
    if (path / SAVED).is_file() and (path / SAVED_STATE).is_file():
        _refuse_keys(source, ("name",), "it is a saved data set without configurations")
        _check_saved_split(path, source)
        return [RecordFile(path)]
    if (path / SAVED_SPLITS).is_file():
        _refuse_keys(source, ("name",), "it is a saved data set without configurations")
        return [RecordFile(path / _choose_saved_split(path, source))]
    return _list_files(read_layout(str(path), source), path.resolve(), source)


def is_dataset_name(path: str) -> bool:
    """Whether a path is no file or folder here, but has the form of a hub data set, owner/name."""
    if not looks_like_dataset_name(path):
        return False
    return not os.path.lexists(path) and not glob.glob(path)


def find_revision(source: Source) -> str | None:
    """Return the commit of a source that is a data set of the hub, None for any other."""
    path = expand_path(source.path)
    if not is_dataset_name(path):
        return None
    return find_hub_layout(path, source.name, source.revision)[1].revision


def _find_hub_files(source: Source) -> list[RecordFile]:
    layout, remote = find_hub_layout(expand_path(source.path), source.name, source.revision)
    return _list_files(layout, remote.folder, source, remote)


def _list_files(
    layout: Layout, root: Path, source: Source, remote: Remote | None = None
) -> list[RecordFile]:
    """The files of the split that a source chooses."""
    chosen = layout.splits[choose_split(list(layout.splits), source)]
    files = [Path(root, file) for file in chosen]
    if layout.kind == IMAGE_KIND:
        return list(_list_image_folder(root, files, source, remote, layout.classes))
    for file in files:
        if not holds_records(file):
            raise UserError(
                f"{source.path} has the file {file.name}, which is not of a kind that is read"
                f" ({SHOWN_SUFFIXES}); unpack or convert it"
            )
    return [RecordFile(file, remote, layout.classes) for file in files]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # no file can have such a name
        return False


def _refuse_keys(source: Source, keys: Sequence[str], reason: str) -> None:
    for key in keys:
        value = getattr(source, key)
        if value is not None:
            raise UserError(
                f"{key} is {value!r}, but has no effect on {source.path}, because {reason}; remove"
                " it"
            )


def _check_saved_split(path: Path, source: Source) -> None:
    """Raise UserError where a saved data set is another split than the one that is asked for."""
    if source.split is None:
        return
    held = _read_json(path / SAVED_STATE).get("_split")
    if held != source.split:
        raise UserError(
            f"split is {source.split!r}, but {source.path} is a saved data set of one split"
            f" ({held}); remove it"
        )


def _choose_saved_split(path: Path, source: Source) -> str:
    splits = _read_json(path / SAVED_SPLITS).get("splits")
    if not isinstance(splits, list) or not splits:
        raise UserError(f"{path / SAVED_SPLITS} names no splits; save the data set again")
    return choose_split([str(split) for split in splits], source)


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the data set again") from None
    return values if isinstance(values, dict) else {}


def choose_split(splits: list[str], source: Source) -> str:
    """Return the split that a source names, or the only one there is.

    Raises:
        UserError: There is no such split, or there are several and none is named.
    """
    if source.split in splits:
        return source.split
    if source.split is None and len(splits) == 1:
        return splits[0]
    given = "no split is given" if source.split is None else f"not {source.split!r}"
    hint = "" if source.split is None else nearest(source.split, splits)
    raise UserError(
        f"{source.path} has the splits {', '.join(splits)}, but {given}{hint}; set `split` of the"
        " source to one of them"
    )


def read_layout(path: str, source: Source, **hub) -> Layout:
    """Return the files of a data set, found by `datasets`. No code of the data set is run.

    Args:
        path: A folder, or the name of a data set of the hub.
        source: The source; `name` chooses a configuration.
        **hub: Further arguments of `load_dataset_builder`, such as `revision`.

    Raises:
        UserError: There are no files of a known kind, or no such configuration.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, name=source.name, **hub)
    except (ValueError, OSError, RuntimeError, TypeError, AttributeError) as error:
        if "is a gated dataset" in str(error):  # `datasets` has taken the hub's own error off
            raise describe_gated(path, "dataset") from None
        _explain_name(path, source, hub)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source.path} is a data set or folder without records that can be told"
            f" ({type(error).__name__}: {reason}); give a file in it, or a folder with"
            f" {', '.join(METADATA)}, class folders, a README.md with configs, or saved by"
            " datasets' save_to_disk"
        ) from None
    kind = type(builder).__module__.rpartition(".")[2]
    files = builder.config.data_files or {}
    splits = {str(split): list(map(str, names)) for split, names in files.items() if names}
    if kind not in (*RECORD_KINDS, IMAGE_KIND) or not splits:
        shown = next((names[0] for names in splits.values()), "no files")
        raise UserError(
            f"{source.path} holds {kind} data ({shown}), but files of records"
            f" ({SHOWN_SUFFIXES}) or folders of images are read; convert it"
        )
    return Layout(kind, splits, find_class_names(builder.info.features or {}))


@lru_cache(maxsize=64)  # every pass through a stream asks
def find_hub_layout(
    name: str, configuration: str | None, revision: str | None
) -> tuple[Layout, Remote]:
    """Return the files of a data set on the hub, and where they lie once they are fetched.

    Where the hub cannot be reached, or is switched off, what it said the last time is used.

    Raises:
        UserError: There is no such data set, or nothing is known of it here.
    """
    notes = _find_notes(name, configuration, revision)
    try:
        if is_offline():
            raise describe_switched_off(name)
        entry = find_on_hub(name, "dataset", revision)
    except HubUnreachable:
        if not notes.is_file():
            raise
        known = json.loads(notes.read_text(encoding="utf-8"))
        remote = Remote(name, known["revision"], frozenset(known["files"]))
        return Layout(known["kind"], known["splits"], known.get("classes", {})), remote
    source = Source(name, name=configuration, revision=revision)
    found = read_layout(name, source, revision=entry.revision)
    prefix = f"hf://datasets/{name}@{entry.revision}/"
    splits = {}
    for split, files in found.splits.items():
        splits[split] = [file.removeprefix(prefix) for file in files]
    facts = {**found._asdict(), "splits": splits, "revision": entry.revision, "files": entry.files}
    notes.parent.mkdir(parents=True, exist_ok=True)
    write_text_file(notes, json.dumps(facts))
    return found._replace(splits=splits), Remote(name, entry.revision, frozenset(entry.files))


def _find_notes(name: str, configuration: str | None, revision: str | None) -> Path:
    """The file that keeps what the hub said of a data set."""
    key = hashlib.sha256(json.dumps([name, configuration, revision]).encode()).hexdigest()
    return find_dataset_notes(name, key[:16])


def _explain_name(path: str, source: Source, hub: dict) -> None:
    """Raise UserError where the configuration is the mistake."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(path, **hub)
    except Exception:  # whatever it is, it was raised before for the data set itself
        return
    if (len(names) > 1 and source.name is None) or (
        source.name is not None and source.name not in names
    ):
        given = "no name is given" if source.name is None else f"not {source.name!r}"
        hint = "" if source.name is None else nearest(source.name, names)
        raise UserError(
            f"{source.path} has the configurations {', '.join(names[:20])}, but {given}{hint}; set"
            " `name` of the source to one of them"
        )


def _list_image_folder(
    root: Path, files: list[Path], source: Source, remote: Remote | None, classes: ClassNames
) -> Iterator[RecordFile]:
    """The metadata files of a folder of images, or its images where it has none."""
    metadata = [file for file in files if file.name in METADATA]
    if metadata:
        for file in metadata:
            yield MetadataFile(file, remote, classes)
        return
    if source.question is None:
        names = root.iterdir() if remote is None else ()
        records = sorted(file.name for file in names if holds_records(file))
        other = f"give {records[0]} in it as path, or " if records else ""
        raise UserError(
            f"{source.path} holds images without {', '.join(METADATA)}; {other}set `question`,"
            " which is asked about every image and answered with its folder's name, or write the"
            " metadata"
        )
    for file in files:
        if file.suffix.lower() == ".zip":
            raise UserError(f"{file} is an archive; unpack it, and remove it from the folder")
        if file.parent == root:
            raise UserError(
                f"the image {file} lies in no class folder; move it into one, whose name is the"
                " answer, or write metadata.jsonl"
            )
        yield LabelledImage(file, remote, root=root)
