"""Make transformers' Auto classes know SparseCut, without importing transformers before the user
does.

`import sparsecut` must stay light, yet `AutoModelForImageTextToText.from_pretrained(folder)` must work after it. So a
finder waits for the Auto modules and registers the configuration and the processor as each has been imported; the model
class follows when the first configuration is made, since importing it earlier would run into transformers' own
half-finished imports.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
PROCESSORS = "transformers.models.auto.processing_auto"
MAPPINGS = (
    "MODEL_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
)


def register_configuration() -> None:
    """Teach AutoConfig our model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from . import configuration

    if hasattr(
        configuration, "SparseCutConfig"
    ):  # else it is being imported, and registers itself at its end
        CONFIG_MAPPING.register("sparsecut", configuration.SparseCutConfig, exist_ok=True)


def register_upgraded_configuration() -> None:
    """Teach AutoConfig the model type of upgraded models."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from . import configuration_upgraded

    if hasattr(configuration_upgraded, "SparseCutUpgradeConfig"):
        CONFIG_MAPPING.register(
            "sparsecut_upgrade", configuration_upgraded.SparseCutUpgradeConfig, exist_ok=True
        )


def register_configurations() -> None:
    """Teach AutoConfig both our model types."""
    register_configuration()
    register_upgraded_configuration()


def register_processor() -> None:
    """Teach AutoProcessor our processors."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    from .configuration import SparseCutConfig
    from .configuration_upgraded import SparseCutUpgradeConfig
    from .processing import SparseCutAudioProcessor, SparseCutProcessor
    from .processing_upgraded import SparseCutUpgradeProcessor

    PROCESSOR_MAPPING.register(SparseCutConfig, SparseCutProcessor, exist_ok=True)
    # One configuration has both processors, and processors are found by their names; a key of its
    # own is all that is needed.
    PROCESSOR_MAPPING.register(SparseCutAudioProcessor, SparseCutAudioProcessor, exist_ok=True)
    PROCESSOR_MAPPING.register(SparseCutUpgradeConfig, SparseCutUpgradeProcessor, exist_ok=True)


def register_model() -> None:
    """Teach the Auto model classes ours."""
    from transformers.models.auto import modeling_auto

    from .configuration import SparseCutConfig
    from .modeling import SparseCutForConditionalGeneration

    for mapping in (getattr(modeling_auto, name) for name in MAPPINGS):
        mapping.register(SparseCutConfig, SparseCutForConditionalGeneration, exist_ok=True)


def register_upgraded() -> None:
    """Teach the Auto model classes the upgraded models."""
    from transformers.models.auto import modeling_auto

    from .configuration_upgraded import SparseCutUpgradeConfig
    from .modeling_upgraded import SparseCutUpgrade

    for mapping in (getattr(modeling_auto, name) for name in MAPPINGS):
        mapping.register(SparseCutUpgradeConfig, SparseCutUpgrade, exist_ok=True)


class _Waiter(importlib.abc.MetaPathFinder):
    """Runs a registration right after its module has been imported."""

    waiting = {CONFIGURATIONS: register_configurations, PROCESSORS: register_processor}

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        register = self.waiting.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            register()

        spec.loader.exec_module = exec_module
        return spec


def register_when_needed() -> None:
    """Register what is already imported now, and the rest when it is."""
    for name in (CONFIGURATIONS, PROCESSORS):
        if name in sys.modules:
            _Waiter.waiting.pop(name)()
    if _Waiter.waiting:
        sys.meta_path.insert(0, _Waiter())
