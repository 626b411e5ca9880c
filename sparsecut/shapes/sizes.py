"""The two sizes of the picture world: the small one, whose backbones are shipped, and a large one
for a GPU.

Both draw the same things in cells of 48 x 48 pixels, so that what the coarse view shows of a thing is the same; the large
one has 4 x 4 cells and five to eight things. The numbers of training steps of the large one are chosen by arithmetic and
tried on no machine: a view costs its encoder 3.9 GFLOP forth and back, so 7,000 steps of 384 views are 10 PFLOP; a conversation
of some 300 tokens costs its language model 45 GFLOP, so 5,000 steps of 64 are 14 PFLOP. A device that does 100 TFLOP a second
at these widths takes four minutes for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..schema import UserError, nearest

CELL = 48
PLACES = {  # cells per side -> the one-word names of the cells, row by row
    2: ("top-left", "top-right", "bottom-left", "bottom-right"),
    4: tuple(
        f"{row}-{column}"
        for row in ("top", "upper", "lower", "bottom")
        for column in ("far-left", "left", "right", "far-right")
    ),
}


@dataclass(frozen=True)
class VisionTraining:
    """Pictures to draw, steps of both phases, pictures per step, peak learning rate, and pictures
    to count right readings in.
    """

    pictures: int
    steps: tuple[int, int]
    batch: int
    rate: float
    warmup: int
    checked: int


@dataclass(frozen=True)
class LanguageTraining:
    """Steps, conversations per step, questions in each, peak learning rate, and conversations to
    count right words in.
    """

    steps: int
    batch: int
    turns: int
    rate: float
    warmup: int
    checked: int


@dataclass(frozen=True)
class Size:
    """A layout of `rows` x `rows` cells, numbers of things with their weights, both backbones and
    how they are made.

    vision, language: arguments of CLIPVisionConfig and GPT2Config. shallow_state: the encoder state
    that detail is read from.
    sides: the slot grids that the language model learns from, drawn at random. ahead: whether
    batches are made by other processes, each from a seed of its own, instead of one after the other
    from one seed. quick: the trainings of a trial.
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
        """Side of the coarse view, and of each of the four fine views, in pixels; the picture's is
        twice that.
        """
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
    # Half the small one's spread of start values at four times the width gives logits the same
    # spread.
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
    """The size of that name, "small" or "large"; a Size as it is. Raises ValueError for any other
    name.
    """
    if isinstance(name, Size):
        return name
    if name not in SIZES:
        raise UserError(
            f"size {name!r} is not known{nearest(name, SIZES)}; allowed are {', '.join(SIZES)}"
        )
    return SIZES[name]
