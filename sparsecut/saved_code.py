"""The source files beside a saved model or processor, which machines without this package run.

transformers runs them for a user who gives `trust_remote_code=True`. It finds them by the
`auto_map` of a saved file. It copies files of one folder only, and follows imports with a single
dot.

This file and those beside it are part of SparseCut, and may be used under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0). SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PROCESSOR_NAME

from .hub import check_hub_answers
from .schema import read_json_file, write_text_file

# Modules that are beside no model. Their names are what an error shows: where the code was left
# out, and where the base's processor is of a class that transformers does not have.
ABSENT = "install_sparsecut"
UNKNOWN = "class_of_the_base_processor"
# A sentence of the card that transformers writes where a repository has none.
AUTOMATIC = "This model card has been automatically generated."
_leaves_code_out = ContextVar("leaves_code_out", default=False)


@contextlib.contextmanager
def without_code() -> Iterator[None]:
    """A context in which models and processors are saved without their source files."""
    token = _leaves_code_out.set(True)
    try:
        yield
    finally:
        _leaves_code_out.reset(token)


def write_code(file: Path, classes: Sequence[type], auto_map: dict[str, str]) -> None:
    """Write the modules of classes beside a saved file, and in the file how they are found.

    Without code, a processor still has an `auto_map`, which leads to no file. transformers would
    otherwise hand out the tokenizer alone, without a word, where this package is missing.

    Args:
        file: The saved config.json or processor_config.json.
        classes: The classes whose modules are needed, with all that these import.
        auto_map: Auto class -> "module.Class".
    """
    values = read_json_file(file)
    before = values.pop("auto_map", None) or {}
    if _leaves_code_out.get():
        auto_map = {name: _lead_nowhere(place) for name, place in auto_map.items()}
        auto_map = {name: auto_map[name] for name in ("AutoProcessor",) if name in auto_map}
    else:
        for kind in classes:
            custom_object_save(kind, file.parent)
        # A class of the user's own stays, but not one in another repository.
        own = {name: place for name, place in before.items() if _is_beside(place, file)}
        auto_map = auto_map | own
    if auto_map:
        values["auto_map"] = auto_map
    write_text_file(file, json.dumps(values, indent=2) + "\n")


def drop_automatic_card(folder: str | Path) -> None:
    """Remove the card that transformers made for a push of a processor: the model's tells more."""
    card = Path(folder) / "README.md"
    if card.is_file() and AUTOMATIC in card.read_text(encoding="utf-8"):
        card.unlink()


class SavesCode:
    """Comes before ProcessorMixin among the bases of a processor that is saved with its code."""

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        self._write_code(working_dir)  # a save that pushes sends files before it returns
        drop_automatic_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Push as transformers does; a hub that is away is told quickly."""
        check_hub_answers(repo_id, kwargs.get("token"))
        return super().push_to_hub(repo_id, *args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Write the processor as transformers does, and its code beside it."""
        saved = super().save_pretrained(str(save_directory), *args, **kwargs)
        self._write_code(save_directory)
        return saved

    def _write_code(self, folder: str | Path) -> None:
        kind = type(self)
        place = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        write_code(Path(folder) / PROCESSOR_NAME, [kind], {"AutoProcessor": place})


def mark_as_missing(file: Path, kind: type) -> None:
    """Note in a saved file that transformers does not have the processor's class.

    It would otherwise hand out the tokenizer alone, without a word.
    """
    values = read_json_file(file)
    if "AutoProcessor" not in (values.get("auto_map") or {}):
        values["auto_map"] = {"AutoProcessor": f"{UNKNOWN}.{kind.__name__}"}
        write_text_file(file, json.dumps(values, indent=2) + "\n")


def _lead_nowhere(place: str) -> str:
    return f"{ABSENT}.{place.partition('.')[2]}"


def _is_beside(place: object, file: Path) -> bool:
    """Whether a place of an auto map is in a module beside the file."""
    if not isinstance(place, str) or "--" in place:
        return False
    return (file.parent / f"{place.partition('.')[0]}.py").is_file()
