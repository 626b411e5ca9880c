"""Licences of pretrained parts, as their cards name them, in the words that the hub knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, model_info, try_to_load_from_cache

from .hub import looks_like_hub_name

CARD = "README.md"
OWN_BACKBONES = Path(__file__).parent / "shapes" / "weights"
SECONDS = 5  # to wait for the hub, for one part's licence
OTHER = "other"
# The hub takes no other word as a licence: https://huggingface.co/docs/hub/repositories-licenses.
WORDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research
    intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
KNOWN = frozenset(WORDS.split())


def is_hub_name(name: str | None) -> bool:
    """Whether a name can be one of the hub, and is no file or folder here."""
    return bool(name) and not Path(name).exists() and looks_like_hub_name(name)


def find_license(name: str | None, *, online: bool) -> str | None:
    """The licence that the card of a part names; None where it is not known.

    Args:
        name: A folder or hub name.
        online: Whether the hub may be asked. Otherwise only files on this machine are read.
    """
    if name is None:
        return None
    folder = Path(name)
    if folder.is_dir():
        if folder.resolve().is_relative_to(OWN_BACKBONES):
            return "apache-2.0"
        return _read_license(folder / CARD)
    if not is_hub_name(name):
        return None
    cached = try_to_load_from_cache(name, CARD)
    if isinstance(cached, str):
        return _read_license(Path(cached))
    if not online:
        return None
    try:
        return _get_license(model_info(name, timeout=SECONDS).card_data)
    except Exception:  # whatever keeps the hub from answering; the card then says it is not known
        return None


def _read_license(card: Path) -> str | None:
    try:
        return _get_license(ModelCard.load(card).data)
    except Exception:  # no card, or a damaged one
        return None


def _get_license(data: Any) -> str | None:
    """The licence in the header of a card: its word, its own name, or several."""
    values = data.to_dict() if data else {}
    value = values.get("license")
    if value == OTHER:
        value = values.get("license_name") or value
    if isinstance(value, list):
        value = ", ".join(str(word) for word in value)
    return value if isinstance(value, str) and value.strip() else None


def describe_licenses(licenses: Sequence[str | None]) -> dict[str, str]:
    """Keys of a card's header for the licence of the whole: none where a part's is not known.

    A licence that the hub has no word for is "other", with its name.
    """
    joined = join_licenses(licenses)
    if joined is None:
        return {}
    if joined in KNOWN:
        return {"license": joined}
    return {
        "license": OTHER,
        "license_name": re.sub(r"[^a-z0-9.]+", "-", joined.lower()).strip("-"),
    }


def join_licenses(licenses: Sequence[str | None]) -> str | None:
    """The licence that all parts share, "other" where they differ, None where one is not known."""
    if not licenses or None in licenses:
        return None
    return licenses[0] if len(set(licenses)) == 1 else OTHER
