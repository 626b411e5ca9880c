"""A joined model is one graph, forward and backward, with logits and gradients of eager mode."""

from helpers import checks
from helpers.families import family_language, family_vision


def test_one_graph_forward_and_backward():
    vision = family_vision("clip_vision_model", num_hidden_layers=2)
    language = family_language("llama", num_hidden_layers=2)
    checks.compiles(checks.join(vision, language))
