"""Gates that are computed in each pass, from the features and the hidden states of an image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .schema import UserError


class ContextGate(nn.Module):
    """Factors for the S shortcuts of a layer, computed for each image.

    A learned query pools the features, and another one the hidden states that they are added to, by
    attention over the image's tokens. A linear map of both summaries gives a factor 2 * sigmoid(.)
    for each shortcut, which starts at 1. Only image positions are pooled, so that later text does
    not reach earlier positions.

    This is our reading of CLI's adaptive gating (arXiv 2601.10710). The two queries, one gate for
    each encoder layer and the sum at image positions are the paper's. Its formula for the gate, and
    whether its hidden states are those of all positions, could not be retrieved.
    """

    def __init__(self, num_shortcuts: int, language_dim: int) -> None:
        super().__init__()
        self.query_features = nn.Parameter(torch.zeros(language_dim))
        self.query_hidden = nn.Parameter(torch.zeros(language_dim))
        self.weight = nn.Parameter(torch.zeros(num_shortcuts, 2 * language_dim))
        self.bias = nn.Parameter(torch.zeros(num_shortcuts))

    def initial_values(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the parameters of this module alone, with their start values."""
        for parameter in self.parameters(recurse=False):
            yield parameter, 0.0

    def forward(self, hidden: Tensor, features: Tensor, num_tokens: int) -> Tensor:
        """Scale the features of a layer's shortcuts and add them up.

        Args:
            hidden: Hidden states before the layer, at the image tokens of all images,
                [B * N', H].
            features: The shortcuts' features there, side by side, [B * N', S * H].
            num_tokens: N', the image tokens of one image.

        Returns:
            What is added to the hidden states, [B * N', H].

        Raises:
            UserError: The pass holds a part of an image, as in a prompt that is cut into chunks.
        """
        if len(hidden) % num_tokens:
            raise UserError(
                f"context gates need whole images of {num_tokens} image tokens, but a pass over a"
                f" part of a prompt has {len(hidden)}; do not cut prompts into chunks with"
                " gate='context' or 'context_zero'"
            )
        z = rearrange(features, "(p n) (s d) -> p n s d", n=num_tokens, s=len(self.bias))
        h = rearrange(hidden.to(z.dtype), "(p n) d -> p n d", n=num_tokens)
        scale = h.shape[-1] ** -0.5
        hidden_weights = torch.softmax(h @ self.query_hidden * scale, 1)
        hidden_summary = torch.einsum("pn,pnd->pd", hidden_weights, h)
        feature_weights = torch.softmax(z @ self.query_features * scale, 1)
        feature_summary = torch.einsum("pns,pnsd->psd", feature_weights, z)
        gates = self._compute_gates(feature_summary, hidden_summary)
        return rearrange(torch.einsum("ps,pnsd->pnd", gates, z), "p n d -> (p n) d")

    def _compute_gates(self, features: Tensor, hidden: Tensor) -> Tensor:
        """Summaries of the features [B, S, H] and of the hidden states [B, H] -> gates [B, S]."""
        features = F.layer_norm(features, features.shape[-1:])
        hidden = F.layer_norm(hidden, hidden.shape[-1:])
        hidden = hidden.unsqueeze(1).expand(-1, features.shape[1], -1)
        both = torch.cat([features, hidden], dim=-1)
        return 2 * torch.sigmoid((both * self.weight).sum(-1) + self.bias)


class ZeroContextGate(ContextGate):
    """The same with the factor 2 * sigmoid(.) - 1, which starts at 0 and so without effect."""

    def _compute_gates(self, features: Tensor, hidden: Tensor) -> Tensor:
        return super()._compute_gates(features, hidden) - 1


class SizeGate(nn.Module):
    """A norm after the projector: features at a learned fraction of the hidden states' size.

    Every token's features are divided by their root mean square, and multiplied by that of the
    hidden states there and by the shortcut's fraction, which starts at `START`. So no projector,
    and no learning rate, can make a shortcut larger than the states that it is added to. The size
    of the hidden states is taken as it is: no gradient goes through it.
    """

    START = 0.1
    EPSILON = 1e-6

    def __init__(self, num_shortcuts: int, language_dim: int) -> None:
        super().__init__()
        self.fractions = nn.Parameter(torch.full((num_shortcuts,), self.START))

    def initial_values(self) -> Iterator[tuple[Tensor, float]]:
        """Yield the fractions with their start."""
        yield self.fractions, self.START

    def forward(self, hidden: Tensor, features: Tensor, num_tokens: int) -> Tensor:
        """Norm the features of a layer's shortcuts and add them up; see `ContextGate.forward`."""
        z = rearrange(features, "t (s d) -> t s d", s=len(self.fractions))
        size = hidden.detach().to(z.dtype).square().mean(-1, keepdim=True).sqrt()
        normed = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + self.EPSILON)
        return size * torch.einsum("s,tsd->td", self.fractions, normed)
