"""Names of models and data sets on the Hugging Face Hub, told from folders, and answered quickly.

The hub's own client repeats a request that has no answer for minutes. So one short request asks
whether the hub is there and has the name, before that client is used.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .schema import UserError
from .shipped_model import SHIPPED_MODEL

SECONDS_TO_CONNECT = 4.0  # and as many to answer
LEAST_LIKENESS = 0.8  # of a mistyped name; no name of the hub without an owner is so like
SECONDS_IN_ALL = 6.0  # looking up the address of a server knows no limit of its own
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SIGN_IN = "sign in with `hf auth login` (or set HF_TOKEN)"
KINDS = {"model": "models", "dataset": "datasets"}


@dataclass(frozen=True)
class HubEntry:
    """What the hub says of a repository.

    Attributes:
        name: Its name, owner/name.
        revision: The commit that a branch or tag stands for. None where the hub cannot be reached,
            and files that were fetched before must do.
        files: Names of its files.
    """

    name: str
    revision: str | None
    files: tuple[str, ...] = ()


def looks_like_hub_name(name: str) -> bool:
    """Whether a text may name a repository, `owner/name` or `name`, and is no path."""
    return HUB_NAME.fullmatch(name) is not None and ".." not in name


def check_model_place(name: str | Path, what: str = "model", **hub: Any) -> dict:
    """Check that a model's folder is there, or that the hub has the name.

    No model library is imported.

    Args:
        name: A folder or hub name.
        what: What it is, for the error, such as "vision model".
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`, as for `from_pretrained`.

    Returns:
        Further arguments of `from_pretrained`: {"local_files_only": True} where the hub cannot be
        reached, but the model was fetched before.

    Raises:
        UserError: There is no such folder and no such name, or the hub cannot be reached.
    """
    text = str(name)
    if _exists(text):
        return {}
    check_not_mistyped(text, what)
    if not looks_like_hub_name(text):
        raise UserError(
            f"there is no folder {text}, which is to hold the {what}; correct the path, or give a"
            " hub name (owner/name)"
        )
    if is_offline() or hub.get("local_files_only"):
        if _is_cached(text, "model", hub):
            return {}
        raise UserError(
            f"the {what} {text} is no folder here, has not been fetched from the hub before, and"
            " the hub is switched off (HF_HUB_OFFLINE, local_files_only); correct the path, or"
            " fetch the model first"
        )
    try:
        find_on_hub(text, "model", hub.get("revision"), hub.get("token"))
    except HubUnreachable:
        if _is_cached(text, "model", hub):
            return {"local_files_only": True}
        raise
    return {}


def check_not_mistyped(name: str, what: str) -> None:
    """Raise UserError where a name is nearly that of what ships, before the hub is asked."""
    is_near = difflib.get_close_matches(name, [SHIPPED_MODEL], n=1, cutoff=LEAST_LIKENESS)
    if is_near and name != SHIPPED_MODEL:
        raise UserError(
            f"there is no {what} {name!r}; did you mean {SHIPPED_MODEL!r}, which ships with the"
            " package? Else give a folder or a hub name (owner/name)"
        )


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # no path has a NUL character
        return False


def fetch_files(name: str, patterns: list[str], hub: dict) -> Path:
    """The files of a model on the hub that match patterns; those that are here without the hub.

    Args:
        name: Its name.
        patterns: Such as "adapters/*".
        hub: Arguments of `from_pretrained` that say how the hub is reached.

    Returns:
        The folder that holds them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    hub = {**hub, **check_model_place(name, **hub)}
    subfolder = hub.pop("subfolder", "")
    patterns = [f"{subfolder}/{pattern}".lstrip("/") for pattern in patterns]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, **hub)
    except (HfHubHTTPError, OSError, ValueError):
        hub["local_files_only"] = True
        folder = snapshot_download(name, allow_patterns=patterns, **hub)
    return Path(folder) / subfolder


def check_dataset_place(name: str, revision: str | None = None) -> None:
    """Check that the hub has a data set, or that something is known of it here.

    Args:
        name: Its name, owner/name.
        revision: A branch, a tag or a commit; None for the main branch.

    Raises:
        UserError: The hub has no such data set, or cannot be reached.
    """
    try:
        if is_offline():
            raise describe_switched_off(name)
        find_on_hub(name, "dataset", revision)
    except HubUnreachable:
        if not any(find_dataset_notes(name, "*").parent.glob(find_dataset_notes(name, "*").name)):
            raise


def find_dataset_notes(name: str, key: str) -> Path:
    """Return the file that keeps what the hub said of a data set.

    Args:
        name: The data set's name.
        key: What tells its configurations and revisions apart.
    """
    from huggingface_hub import constants

    return Path(constants.HF_HOME, "sparsecut", f"{name.replace('/', '--')}-{key}.json")


def describe_switched_off(name: str) -> HubUnreachable:
    """Return the error of a data set that is not here while the hub is switched off."""
    return HubUnreachable(f"there is no {name} here, and the hub is switched off (HF_HUB_OFFLINE)")


def is_offline() -> bool:
    """Whether the user has switched the hub off."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _is_cached(name: str, kind: str, hub: dict) -> bool:
    """Whether a repository's configuration lies in the cache of the hub's client."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "processor_config.json", "tokenizer_config.json"):
        path = try_to_load_from_cache(
            name,
            file,
            cache_dir=hub.get("cache_dir"),
            revision=hub.get("revision"),
            repo_type=kind,
        )
        if isinstance(path, str):
            return True
    return False


class HubUnreachable(UserError):
    """The hub gives no answer."""


@lru_cache(maxsize=256)  # every part of a model asks again
def find_on_hub(
    name: str, kind: str, revision: str | None = None, token: str | bool | None = None
) -> HubEntry:
    """Ask the hub for a repository.

    Args:
        name: Its name.
        kind: "model" or "dataset".
        revision: A branch, a tag or a commit; None for the main branch.
        token: As `from_pretrained` takes it.

    Returns:
        What the hub says.

    Raises:
        HubUnreachable: There is no answer within some seconds.
        UserError: The hub has no such repository or revision, or does not let this user read it.
    """
    result: list = []

    def ask() -> None:
        try:
            result.append(_request(name, kind, revision, token))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS_IN_ALL)
    answer = result[0] if result else TimeoutError("no answer")
    if isinstance(answer, Exception):
        raise explain_hub_error(answer, name, kind, revision) from None
    return answer


def _request(name: str, kind: str, revision: str | None, token: Any) -> HubEntry:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    read_info = api.model_info if kind == "model" else api.dataset_info
    info = read_info(name, revision=revision, timeout=SECONDS_TO_CONNECT)
    files = tuple(file.rfilename for file in info.siblings or ())
    return HubEntry(name, info.sha, files)


def check_hub_answers(name: str, token: str | bool | None = None) -> None:
    """Raise HubUnreachable where the hub gives no answer about a name, which it need not have.

    Whoever pushes asks this first: the hub's own client tries for minutes.
    """
    from huggingface_hub import constants

    try:
        find_on_hub(name, "model", token=token)
    except HubUnreachable:
        state = "is switched off (HF_HUB_OFFLINE)" if is_offline() else "gives no answer"
        raise HubUnreachable(
            f"{name} cannot be pushed: the hub {constants.ENDPOINT} {state}; check the connection"
            " (HF_ENDPOINT, HTTPS_PROXY), or write the folder with `sparsecut push --dry-run`"
        ) from None
    except UserError:  # the hub has answered
        return


def describe_gated(name: str, kind: str) -> UserError:
    """Return the error of a repository that only those may read who have asked for it."""
    from huggingface_hub import constants

    folder = "datasets/" if kind == "dataset" else ""
    return UserError(
        f"the {kind} {name} is gated: ask for access on {constants.ENDPOINT}/{folder}{name}, then"
        f" {SIGN_IN}"
    )


def explain_hub_error(error: Exception, name: str, kind: str, revision: str | None) -> Exception:
    """Return the error of a request in words; an error that is not the hub's stays as it is."""
    from huggingface_hub import constants, errors

    place = f"{kind} {name}"
    if isinstance(error, errors.GatedRepoError):
        return describe_gated(name, kind)
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(
            f"the {place} has no revision {revision!r} on the hub; give a branch, a tag or a commit"
            " of it, or leave revision out"
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return UserError(
            f"there is no folder {name} here, and the hub has no {place} that you may read; correct"
            f" the path or the name, or, where it is private, {SIGN_IN}"
        )
    if isinstance(error, errors.HTTPError | OSError | errors.HFValidationError):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return HubUnreachable(
            f"there is no folder {name} here, and the hub {constants.ENDPOINT} cannot be asked for"
            f" the {place} ({reason}); correct the path, or the connection (HF_ENDPOINT,"
            " HTTPS_PROXY)"
        )
    return error
