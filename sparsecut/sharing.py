"""Handing a saved model on: its folder to the hub, and from the hub to a folder."""

from __future__ import annotations

import logging
import shlex
import shutil
import tempfile
from dataclasses import replace
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.utils import cached_file

from .adapters import FOLDER as ADAPTERS
from .adapters import list_adapted_parts
from .card import (
    CARD,
    ModelFacts,
    Score,
    describe_config,
    describe_shortcuts,
    is_unedited,
    make_card,
    rename,
    write_card,
)
from .configuration import SparseCutConfig, SparseCutUpgradeConfig
from .hub import check_hub_answers, check_model_place, fetch_files
from .loading import load_pretrained
from .modeling_upgraded import FACTS, WEIGHTS, SparseCutUpgrade
from .schema import UserError, read_json_file, read_text_file, write_text_file
from .upgrading import read_facts

logger = logging.getLogger(__name__)

# Of a run rather than of its model: what it logs, and what it needs to go on.
LEFT_OUT = ("checkpoint-*", "*.part", "log.jsonl", "skipped.txt", "training_args.bin", ".*")
LEFT_OUT += ("__pycache__*", "optimizer.pt", "scheduler.pt", "rng_state*", "trainer_state.json")
SHORTCUTS_FILES = [WEIGHTS, FACTS, f"{ADAPTERS}/*", "*.json", "*.jinja", "*.model", "*.txt"]


def describe_folder(folder: Path) -> ModelFacts:
    """What a folder tells of the model or the shortcuts in it, without loading weights.

    Raises:
        UserError: It holds neither.
    """
    adapted = list_adapted_parts(folder)
    if (folder / FACTS).is_file():
        return replace(describe_shortcuts(read_facts(folder)), adapted=adapted)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds neither config.json nor {FACTS}, so there is no model to hand on; give"
            f" the folder that training or save wrote, for example {folder}/final"
        )
    complaint = f"the configuration in {folder} cannot be read; save the model again"
    config = load_pretrained(AutoConfig, folder, complaint)
    if not isinstance(config, SparseCutConfig | SparseCutUpgradeConfig):
        raise UserError(
            f"{folder} holds a model of type {config.model_type}, which is not SparseCut's; give a"
            " model that build, upgrade or train wrote"
        )
    return replace(describe_config(config), adapted=adapted)


def push_folder(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Push a saved model, its processor, adapters, code and card to the hub.

    A card is written where there is none. One that the user has edited is pushed as it is. What a
    training run logged, and its checkpoints, stay here.

    Args:
        folder: What `save`, `save_fusion` or training wrote.
        name: The repository's name on the hub, "owner/model".
        private: Whether a new repository is private. Default: as the owner's settings say.
        token: The token of the hub. Default: that of `hf auth login`.
        dry_run: A folder that gets what would be pushed; nothing is sent then.

    Returns:
        The address of the repository, or the folder of the dry run.

    Raises:
        UserError: There is no model, the name cannot be one, or the hub refuses it.
    """
    folder = Path(folder)
    facts = describe_folder(folder)
    check_name(name)
    if dry_run is None:
        check_hub_answers(name, token)
    _check_base_is_known(facts)
    card = _make_pushed_card(folder, facts, name, online=dry_run is None)
    if dry_run is not None:
        target = _copy(folder, Path(dry_run))
        write_text_file(target / CARD, card)
        return str(target)
    write_text_file(folder / CARD, card)
    patterns = [pattern for part in LEFT_OUT for pattern in (part, f"{part}/*")]
    if is_unedited(card) and _is_edited_on_hub(name, token):
        patterns.append(CARD)
    api = HfApi(library_name="sparsecut", token=token)
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=folder,
            commit_message="Upload model",
            ignore_patterns=patterns,
        )
    except (HfHubHTTPError, HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} cannot be pushed ({reason}); log in with `hf auth login`, name a repository of"
            " your own, or try --dry-run FOLDER"
        ) from error
    return str(address)


def push_fusion(
    model: SparseCutUpgrade, name: str, *, processor: Any = None, **settings: Any
) -> str:
    """Push the shortcuts of an upgraded model alone, with adapters, to a repository of their own.

    Args:
        model: The upgraded model.
        name: The repository's name on the hub, "owner/shortcuts".
        processor: Its processor. Default: whoever loads the shortcuts gets that of the base.
        **settings: See `push_folder`.

    Returns:
        As `push_folder`.
    """
    check_name(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_fusion(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        return push_folder(folder, name, **settings)


def check_name(name: str) -> None:
    """Raise UserError where a name cannot be that of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} cannot be a name on the hub ({error}); write owner/model, for example"
            " me/my-model"
        ) from error


def _check_base_is_known(facts: ModelFacts) -> None:
    """Warn where nobody else can load the shortcuts: their base is in a folder of this machine."""
    base = facts.parts[0].name
    if facts.are_shortcuts_alone and (base is None or Path(base).exists()):
        logger.warning(
            "the base of these shortcuts is %s, which others do not have; push a whole model, or"
            " tell them to give it as sparsecut.load(name, base=...)",
            base or "of unknown name",
        )


def _make_pushed_card(folder: Path, facts: ModelFacts, name: str, *, online: bool) -> str:
    """The card to push: the folder's, with the repository's name unless a user has edited it."""
    file = folder / CARD
    text = read_text_file(file) if file.is_file() else None
    if text is not None and not is_unedited(text):
        return text
    renamed = rename(text, name) if text else None
    return renamed or make_card(facts, name, online=online)


def _is_edited_on_hub(name: str, token: str | bool | None) -> bool:
    """Whether a repository has a card that a user wrote or edited; that one stays."""
    try:
        text = ModelCard.load(name, token=token, ignore_metadata_errors=True).content
    except (HfHubHTTPError, OSError):  # there is no card, or no repository yet
        return False
    except ValueError:  # a header that is no YAML: written by hand
        return True
    if is_unedited(text):
        return False
    logger.warning("the card of %s was edited on the hub, and stays as it is", name)
    return True


def _copy(folder: Path, target: Path) -> Path:
    """Copy what is pushed to another folder, which is new or empty."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} is not empty; give --dry-run a new folder")
    if folder.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target} lies in {folder}, which is copied; give --dry-run another")

    def ignore(_: Any, names: list[str]) -> set[str]:
        return {name for name in names for pattern in LEFT_OUT if fnmatch(name, pattern)}

    return Path(shutil.copytree(folder, target, ignore=ignore, dirs_exist_ok=True))


# ---- from the hub


def find_shortcuts(name: str | Path, **hub: Any) -> Path | None:
    """The folder of shortcuts alone, fetched where they are on the hub; None for whole models.

    Args:
        name: A folder or hub name.
        **hub: How to reach the hub; see `loading.HUB_ARGUMENTS`.
    """
    if Path(name).exists():
        return Path(name) if (Path(name) / FACTS).is_file() else None
    hub = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    quiet = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    hub = {**hub, **check_model_place(name, **hub)}
    try:
        facts = cached_file(str(name), FACTS, **hub, **quiet)
    except (OSError, ValueError):  # whoever loads the model says why
        return None
    if facts is None:
        return None
    return fetch_files(str(name), SHORTCUTS_FILES, hub)


# ---- scores for the card


def read_scores(out: str | Path) -> list[Score]:
    """The scores that an evaluation wrote: of one data file, or of several benchmarks.

    Args:
        out: The evaluation's output folder (`sparsecut eval --out`).

    Raises:
        UserError: There is no result, or a damaged one.
    """
    out = Path(out)
    files = [out / "result.json"] if (out / "result.json").is_file() else []
    files = files or sorted(out.glob("*/result.json"))
    scores = []
    for file in files:
        scores += _read_result(file)
    if not scores:
        raise UserError(
            f"{out} holds no result.json with scores; give the folder that `sparsecut eval --out`"
            " wrote, once all questions are answered"
        )
    return scores


def _read_result(file: Path) -> list[Score]:
    values = read_json_file(file)
    try:
        count = int(values["num_examples"])
        command = values.get("command")
        if "task" not in values:
            interval = _to_percent(values.get("interval"))
            name = _find_data_name(command) or file.parent.name
            value = 100 * float(values["accuracy"])
            is_over = values.get("interval_over") == "images"
            return [Score(name, "accuracy", value, interval, count, command, is_over)]
        fraction = values.get("share_right") or {}
        main = values.get("main") or {}
        scores = []
        for metric, value in main.items():
            is_share = abs(float(value) - 100 * fraction.get("value", -1)) < 1e-6
            interval = _to_percent(fraction.get("interval")) if is_share else None
            is_over = fraction.get("interval_over") == "images"
            facts = (float(value), interval, count, command, is_over)
            scores.append(Score(values["title"], metric, *facts))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} is no result of an evaluation ({type(error).__name__}: {error}); give the"
            " folder that `sparsecut eval --out` wrote"
        ) from error
    return scores


def _to_percent(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = interval
    return 100 * float(low), 100 * float(high)


def _find_data_name(command: str | None) -> str | None:
    """The name of the data file in a command, without folders."""
    words = shlex.split(command) if command else []
    for word, following in pairwise(words):
        if word == "--data":
            return Path(following).stem
        if word.startswith("--data="):
            return Path(word.partition("=")[2]).stem
    return None


def mend_pushed_card(
    folder: Path, config: Any, name: str, *, token: str | bool | None = None
) -> bool:
    """Write the card of a model that transformers pushes, unless a user wrote or edited one.

    The card that transformers made becomes ours; its tags stay.

    Args:
        folder: What will be pushed.
        config: The configuration of the model.
        name: The repository's name.
        token: The token of the hub.

    Returns:
        Whether the folder's card is to be pushed: not where one was edited on the hub.
    """
    file = folder / CARD
    text = read_text_file(file) if file.is_file() else ""
    if text and not is_unedited(text):
        return True
    if _is_edited_on_hub(name, token):
        return False
    tags = (ModelCard(text).data.tags or []) if text else []
    write_card(folder, describe_config(config), name=name, online=True, tags=tuple(tags))
    return True
