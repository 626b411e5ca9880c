"""The model below its head: what transformers calls `base_model`, for those who want states and not
words.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast


class SparseCutModel(nn.Module):
    """A model's encoder, fusion and language model, without the head's logits.

    The modules are the model's own and nothing is copied. It is no part of the model, so that no
    weight has two names.
    """

    _tp_plan, _pp_plan = (
        {},
        {},
    )  # transformers asks a base model for these; ours come from its parts

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.vision_tower, self.fusion, self.language_model = (
            model.vision_tower,
            model.fusion,
            model.language_model,
        )
        self.get_image_features, self.run = model.get_image_features, model.forward

    def get_input_embeddings(self):
        """The language model's embeddings of tokens."""
        return self.language_model.get_input_embeddings()

    def forward(self, **inputs) -> BaseModelOutputWithPast:
        """What the model's forward takes, without labels; last_hidden_state [B, L, H] is what its
        head reads.
        """
        outputs = self.run(**inputs, output_hidden_states=True, logits_to_keep=1)
        names = ("past_key_values", "hidden_states", "attentions")
        kept = {name: outputs.get(name) for name in names}
        return BaseModelOutputWithPast(last_hidden_state=outputs.hidden_states[-1], **kept)
