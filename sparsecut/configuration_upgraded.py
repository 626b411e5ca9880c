"""The configuration of an upgraded model: its base's, and the plan of the shortcuts on top."""

from __future__ import annotations

import copy
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .plan import Plan
from .registration import register_upgraded, register_upgraded_configuration


@strict
class SparseCutUpgradeConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseCutUpgrade`].

    base_config: configuration (or its dict) of the vision-language model that was upgraded. plan:
    the shortcuts, in full.
    base_name: where the base came from. base_digest: what `upgrading.digest` says of it.
    """

    model_type = "sparsecut_upgrade"
    sub_configs_defaults: ClassVar[dict] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llava")
    }

    base_config: dict | PreTrainedConfig | None = None
    plan: dict | None = None
    base_name: str | None = None
    base_digest: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        register_upgraded()

    @classmethod
    def of(cls, base, plan: Plan, name: str | None, digest: str | None) -> SparseCutUpgradeConfig:
        """The configuration of a base under a plan; the base's own is copied, as sub-configurations
        are reset when handed over.
        """
        return cls(
            base_config=copy.deepcopy(base.config),
            plan=plan.to_dict(),
            base_name=name,
            base_digest=digest,
        )

    def get_plan(self) -> Plan:
        """The plan as data of this package."""
        return Plan.from_dict(self.plan)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The configuration of the base's language model."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the base's language model."""
        return self.base_config.get_text_config()

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The configuration of the base's vision encoder."""
        return self.base_config.vision_config

    @property
    def vision_depth(self) -> int:
        """Number of encoder blocks."""
        vision = self.vision_config
        return vision.num_hidden_layers if hasattr(vision, "num_hidden_layers") else vision.depth

    @property
    def language_depth(self) -> int:
        """Number of decoder layers."""
        return self.text_config.num_hidden_layers

    @property
    def image_token_id(self) -> int:
        """The base's placeholder for one image token."""
        return self.base_config.image_token_id


register_upgraded_configuration()
