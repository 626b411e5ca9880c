"""Make transformers' Auto classes know SparseCut, without importing transformers early.

`import sparsecut` must stay light, yet `AutoModelForImageTextToText.from_pretrained(folder)` must
work after it. So a finder waits for the Auto modules. It registers configurations and processors
when those modules have been imported. Model classes follow when the first configuration is made:
earlier, transformers' own imports may be unfinished.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

CONFIGURATIONS = "transformers.models.auto.configuration_auto"
PROCESSORS = "transformers.models.auto.processing_auto"
# configuration class -> module of its models, class without a head, class with a head
MODELS = {
    "SparseCutConfig": ("modeling", "SparseCutModel", "SparseCutForConditionalGeneration"),
    "SparseCutUpgradeConfig": ("modeling_upgraded", "SparseCutUpgradeModel", "SparseCutUpgrade"),
}


def register_configurations() -> None:
    """Teach AutoConfig our model types."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from . import configuration

    if not hasattr(configuration, "SparseCutUpgradeConfig"):
        return  # it is being imported, and registers itself at its end
    for config_class in (configuration.SparseCutConfig, configuration.SparseCutUpgradeConfig):
        CONFIG_MAPPING.register(config_class.model_type, config_class, exist_ok=True)


def register_models(config_class: type) -> None:
    """Teach the Auto model classes the models of a configuration class."""
    from transformers.models.auto import modeling_auto

    mappings = {
        "AutoModel": modeling_auto.MODEL_MAPPING,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        "AutoModelForMultimodalLM": modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
    }
    for auto_class, model_class in get_model_classes(config_class).items():
        mappings[auto_class].register(config_class, model_class, exist_ok=True)


def get_model_classes(config_class: type) -> dict[str, type]:
    """Auto class -> the model that it gives for a configuration class.

    `AutoModel` leads to the model without a head, the others to the model with one.
    """
    name, headless, whole = MODELS[config_class.__name__]
    # By name, because transformers saves every file that an import statement names beside a model.
    # A model needs neither the other kind of model nor the processors.
    try:
        module = importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return {}  # code saved beside a model, of which the configuration alone was fetched so far
    return {
        "AutoModel": getattr(module, headless),
        "AutoModelForImageTextToText": getattr(module, whole),
        "AutoModelForMultimodalLM": getattr(module, whole),
    }


def register_processors() -> None:
    """Teach AutoProcessor our processors."""
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    from .configuration import SparseCutConfig, SparseCutUpgradeConfig

    processing = importlib.import_module(".processing", __package__)
    audio = importlib.import_module(".processing_audio", __package__)
    upgraded = importlib.import_module(".processing_upgraded", __package__)
    entries = {
        SparseCutConfig: processing.SparseCutProcessor,
        SparseCutUpgradeConfig: upgraded.SparseCutUpgradeProcessor,
        # SparseCutConfig has two processors. They are found by name, so any key does.
        audio.SparseCutAudioProcessor: audio.SparseCutAudioProcessor,
    }
    for key, processor_class in entries.items():
        PROCESSOR_MAPPING.register(key, processor_class, exist_ok=True)


class _Waiter(importlib.abc.MetaPathFinder):
    """Runs a registration right after its module has been imported."""

    waiting = {CONFIGURATIONS: register_configurations, PROCESSORS: register_processors}

    def find_spec(self, name: Any, path: Any = None, target: Any = None) -> Any:
        if name not in self.waiting:
            return None
        register = self.waiting.pop(name)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            register()

        spec.loader.exec_module = exec_module
        return spec


def register_when_needed() -> None:
    """Register what is already imported now, and the rest when it is imported."""
    for name in (CONFIGURATIONS, PROCESSORS):
        if name in sys.modules:
            _Waiter.waiting.pop(name)()
    if _Waiter.waiting:
        sys.meta_path.insert(0, _Waiter())
