"""SparseCut: sparse shortcuts between a vision encoder and a language model (arXiv 2602.00505).

Importing this loads no model library; the names below arrive when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_when_needed

if TYPE_CHECKING:  # what type checkers and editors see
    from .building import build as build
    from .building import load as load
    from .chat import Chat as Chat
    from .configuration import SparseCutConfig as SparseCutConfig
    from .configuration import SparseCutUpgradeConfig as SparseCutUpgradeConfig
    from .drawing import draw as draw
    from .evaluation.evaluator import evaluate as evaluate
    from .methods import METHODS as METHODS
    from .methods import make_plan as make_plan
    from .modeling import SparseCutForConditionalGeneration as SparseCutForConditionalGeneration
    from .modeling_upgraded import SparseCutUpgrade as SparseCutUpgrade
    from .plan import Plan as Plan
    from .plan import Shortcut as Shortcut
    from .processing import SparseCutProcessor as SparseCutProcessor
    from .replanning import replan as replan
    from .training.stages import train as train
    from .upgrading import upgrade as upgrade

__version__ = "0.1.0"

_HOMES = {
    "Plan": "plan",
    "Shortcut": "plan",
    "METHODS": "methods",
    "make_plan": "methods",
    "build": "building",
    "upgrade": "upgrading",
    "load": "building",
    "replan": "replanning",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'sparsecut' has no attribute {name!r}; its public names are"
            f" {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(f"sparsecut.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


register_when_needed()
