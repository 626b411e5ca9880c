"""SparseCut: sparse shortcuts between a vision encoder and a language model (arXiv 2602.00505).

Importing this loads no model library; the names below arrive when they are first used.
"""

import importlib

from .registration import register_when_needed

__version__ = "0.1.0"

_HOMES = {
    "Plan": "plan",
    "Shortcut": "plan",
    "METHODS": "methods",
    "make_plan": "methods",
    "build": "building",
    "upgrade": "upgrading",
    "load": "building",
    "train": "training.stages",
    "evaluate": "evaluation.evaluator",
    "Chat": "chat",
    "draw": "drawing",
    "SparseCutConfig": "configuration",
    "SparseCutProcessor": "processing",
    "SparseCutForConditionalGeneration": "modeling",
    "SparseCutUpgrade": "modeling_upgraded",
    "SparseCutUpgradeConfig": "configuration",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(
            f"module 'sparsecut' has no attribute {name!r}; its public names are"
            f" {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"sparsecut.{_HOMES[name]}"), name)


def __dir__():
    return __all__


register_when_needed()
