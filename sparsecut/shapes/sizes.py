"""The two sizes of drawn shapes: a small one, whose backbones ship, and a large one for a GPU.

Both draw the same things in cells of 48 x 48 pixels, so the coarse view shows equally much of a
thing. The large size has 4 x 4 cells and five to eight things.

The large size's training steps were chosen by arithmetic and tried on no machine. A view costs its
encoder 3.9 GFLOPs forward and backward, so 7,000 steps of 384 views are 10 PFLOPs. A conversation
of some 300 tokens costs its language model 45 GFLOPs, so 5,000 steps of 64 are 14 PFLOPs. A device
that reaches 100 TFLOP/s at these widths takes four minutes for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schema import UserError, nearest

CELL = 48  # pixels per side of a cell
_ROWS = ("top", "upper", "lower", "bottom")
_COLUMNS = ("far-left", "left", "right", "far-right")
PLACES = {  # cells per side -> one-word names of the cells, row by row
    2: ("top-left", "top-right", "bottom-left", "bottom-right"),
    4: tuple(f"{row}-{column}" for row in _ROWS for column in _COLUMNS),
}


@dataclass(frozen=True)
class VisionTraining:
    """How the encoder is trained.

    Attributes:
        images: Images to draw.
        steps: Steps of both phases.
        batch: Images per step.
        rate: Peak learning rate.
        warmup: Steps until the peak.
        checked: Images on which accuracy is measured.
    """

    images: int
    steps: tuple[int, int]
    batch: int
    rate: float
    warmup: int
    checked: int


@dataclass(frozen=True)
class LanguageTraining:
    """How the language model is trained.

    Attributes:
        steps: Training steps.
        batch: Conversations per step.
        turns: Questions in each conversation.
        rate: Peak learning rate.
        warmup: Steps until the peak.
        checked: Conversations on which accuracy is measured.
    """

    steps: int
    batch: int
    turns: int
    rate: float
    warmup: int
    checked: int


@dataclass(frozen=True)
class Size:
    """A layout, both backbones, and how they are trained.

    Attributes:
        name: "small" or "large".
        rows: Cells per side.
        num_things: Possible numbers of things in a scene.
        weights: Their probabilities.
        vision: Arguments of CLIPVisionConfig.
        shallow_state: The encoder's hidden state that detail is read from.
        language: Arguments of GPT2Config.
        sides: Slot grids that the language model learns from, drawn at random.
        vision_training: How the encoder is trained.
        language_training: How the language model is trained.
        ahead: Whether other processes prepare batches, each batch from a seed of its own.
            Otherwise one generator goes on from batch to batch.
        quick: Both trainings of a trial run.
    """

    name: str
    rows: int
    num_things: tuple[int, ...]
    weights: tuple[float, ...]
    vision: dict
    shallow_state: int
    language: dict
    sides: tuple[tuple[int, ...], ...]
    vision_training: VisionTraining
    language_training: LanguageTraining
    ahead: bool
    quick: tuple[VisionTraining, LanguageTraining]

    @property
    def coarse(self) -> int:
        """Pixels per side of the coarse view and of each fine view; an image has twice as many."""
        return self.rows * CELL // 2

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the cells."""
        return PLACES[self.rows]


GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True}
SMALL = Size(
    name="small",
    rows=2,
    num_things=(3, 4),
    weights=(0.4, 0.6),
    vision={
        "hidden_size": 96,
        "num_attention_heads": 4,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "image_size": 48,
        "patch_size": 12,
        "hidden_act": "gelu",
    },
    shallow_state=3,
    language={
        "n_embd": 96,
        "n_head": 4,
        "n_layer": 6,
        "n_positions": 512,
        "initializer_range": 0.06,
        **GPT2,
    },
    sides=((4,), (4,), (8,), (4, 8)),
    vision_training=VisionTraining(16000, (3000, 500), 16, 1.5e-3, 50, 512),
    language_training=LanguageTraining(1600, 16, 16, 2e-3, 80, 64),
    ahead=False,
    quick=(
        VisionTraining(64, (4, 2), 16, 1.5e-3, 50, 512),
        LanguageTraining(3, 16, 16, 2e-3, 80, 64),
    ),
)
LARGE = Size(
    name="large",
    rows=4,
    num_things=(5, 6, 7, 8),
    weights=(0.25, 0.25, 0.25, 0.25),
    vision={
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
        "num_hidden_layers": 12,
        "image_size": 96,
        "patch_size": 12,
        "hidden_act": "gelu",
    },
    shallow_state=4,
    # Four times the width with half the spread of initial values gives logits the same spread.
    language={
        "n_embd": 384,
        "n_head": 6,
        "n_layer": 12,
        "n_positions": 1024,
        "initializer_range": 0.03,
        **GPT2,
    },
    sides=((8,), (8,), (16,), (8, 16)),
    vision_training=VisionTraining(40000, (6000, 1000), 128, 1e-3, 200, 512),
    language_training=LanguageTraining(5000, 64, 16, 6e-4, 200, 256),
    ahead=True,
    quick=(VisionTraining(8, (2, 1), 2, 1e-3, 1, 4), LanguageTraining(2, 2, 4, 6e-4, 1, 4)),
)
SIZES = {size.name: size for size in (SMALL, LARGE)}


def find_size(name: str | Size) -> Size:
    """The size of a name; a Size is returned as it is.

    Raises:
        UserError: The name is unknown.
    """
    if isinstance(name, Size):
        return name
    if name not in SIZES:
        raise UserError(
            f"size {name!r} is not known{nearest(name, SIZES)}; allowed are {', '.join(SIZES)}"
        )
    return SIZES[name]
