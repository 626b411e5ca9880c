"""The connection plan: which encoder layers are read, how they are mixed, and where the language
model receives them.

A plan is frozen data, equal to its JSON, and knows nothing of torch. Encoder layers ("taps") are numbered like Hugging
Face `hidden_states`: 0 is the embedding output, k the output of block k counted from 1, negatives count from the end
(-2 is the last block but one). Decoder layers are numbered from 0; features are added *before* a layer, and layer 0 is
the input embedding itself, whose image positions start at zero.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .schema import UserError, build_dataclass, make_tuples, nearest

MIXES = ("pick", "channels", "tokens", "append", "attend", "enrich", "base")
GATES = (None, "zero", "one", "zero_vector", "one_vector", "context", "zero_projector")
ZERO_INIT_GATES = (
    "zero",
    "zero_vector",
    "zero_projector",
)  # gates under which a new model is the one without shortcuts
POOLED = (
    8  # neighbours along the raster that `append` makes one token of, as Dense Connector's STI does
)
Tap = int | tuple[int, ...]


@dataclass(frozen=True)
class Shortcut:
    """Read `taps` of the encoder, mix them, add the result before decoder layer `layer`.

    A tap that is a tuple stands for the mean of its states. `mix` is one of `pick` (one grain of
    the last tap), `channels` (all taps and grains of a patch side by side), `tokens` (grains one
    after the other: a longer prompt), `append` (coarse patches of the last tap, then the other taps
    pooled: a longer prompt too), `attend` (coarse patches of the last tap attend to everything
    else, then a feed-forward) and `enrich` (the same as a gated residual that starts as the coarse
    patches). `base` has no taps and no weights here: it is what a finished vision-language model,
    upgraded by the plan's other shortcuts, feeds to its input by itself. `grain` is read by `pick`
    only: 0 is the coarse patch, 1 to tiles^2 the fine patches under it, row by row.
    """

    taps: tuple[Tap, ...]
    layer: int
    mix: str = "pick"
    grain: int = 0

    def __post_init__(self):
        taps = (self.taps,) if isinstance(self.taps, int) else tuple(self.taps)
        taps = tuple(tuple(tap) if isinstance(tap, list) else tap for tap in taps)
        object.__setattr__(self, "taps", taps)
        numbers = (*self.flat_taps, self.layer, self.grain)
        if (
            bool(taps) == (self.mix == "base")
            or () in taps
            or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers)
        ):
            raise UserError(
                "a shortcut needs whole numbers for taps (at least one), layer and grain, but was"
                f" given taps={self.taps!r}, layer={self.layer!r}, grain={self.grain!r}; write for"
                " example Shortcut(taps=(-2,), layer=0), and taps=() with mix='base' only"
            )
        if self.mix not in MIXES:
            raise UserError(
                f"mix {self.mix!r} is not known{nearest(self.mix, MIXES)}; allowed are"
                f" {', '.join(MIXES)}"
            )
        if self.grain and self.mix != "pick":
            raise UserError(
                f"grain={self.grain} has no effect with mix={self.mix!r}, which uses every grain;"
                " leave grain at 0 or use mix='pick'"
            )

    @property
    def flat_taps(self) -> tuple[int, ...]:
        """Every state that is read, those of means included, in the order given."""
        return tuple(t for tap in self.taps for t in (tap if isinstance(tap, tuple) else (tap,)))

    @property
    def is_coarse(self) -> bool:
        """Whether the coarse view is all it reads."""
        return self.mix in ("append", "base") or (self.mix == "pick" and self.grain == 0)


@dataclass(frozen=True)
class Plan:
    """A model's shortcuts and what they have in common.

    tiles: 0 reads one coarse view; t >= 2 adds a t x t grid of finer views, so a picture is 1 + t^2
    views.
    shared: one mixer and projector for all shortcuts of the same kind, instead of one each.
    norm: LayerNorm without parameters on every tapped feature, before mixing.
    gate: None adds features as they are; "zero" and "one" give every shortcut but the first into
    the input a trained factor
        with that start, "zero_vector" and "one_vector" a factor per channel; "context" computes the
        factors of the shortcuts above the input from the hidden states and features of each
        picture; "zero_projector" has no factor, but the last layer of those shortcuts' projectors
        starts at zero.
    rank: every shortcut but the first into the input has a projector of that inner width; where
    projectors are shared, it
        gets a correction of that rank to the shared one instead.
    """

    shortcuts: tuple[Shortcut, ...]
    tiles: int = 0
    shared: bool = False
    norm: bool = True
    gate: str | None = None
    rank: int | None = None

    def __post_init__(self):
        make_tuples(self, "shortcuts")
        if self.gate not in GATES:
            known = [gate for gate in GATES if gate]
            raise UserError(
                f"gate {self.gate!r} is not known{nearest(self.gate, known)}; allowed are"
                f" {', '.join(known)} or none at all"
            )
        if self.rank is not None and (
            isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1
        ):
            raise UserError(
                f"rank is {self.rank!r}, but must be a whole number of at least 1, or left out"
            )
        if self.gate == "zero_projector" and self.shared:
            raise UserError(
                "gate='zero_projector' starts the shortcuts' own projectors at zero, but"
                " shared=True gives them the input's; use shared=False, or another gate such as"
                " 'zero'"
            )
        if not isinstance(self.shared, bool) or not isinstance(self.norm, bool):
            raise UserError(
                f"shared and norm are true or false, but shared={self.shared!r} and"
                f" norm={self.norm!r} were given"
            )
        if (
            isinstance(self.tiles, bool)
            or not isinstance(self.tiles, int)
            or self.tiles < 0
            or self.tiles == 1
        ):
            raise UserError(
                f"tiles is {self.tiles!r}, but must be 0 (coarse view only) or at least 2 (a grid"
                " of finer views)"
            )
        self._check_shortcuts()

    def _check_shortcuts(self):
        if not any(s.layer == 0 for s in self.shortcuts):
            raise UserError(
                "no shortcut of the plan adds to layer 0, so image positions would enter the"
                " language model as zeros; add one, e.g. Shortcut(taps=(-2,), layer=0)"
            )
        if (
            any(s.layer for s in self.shortcuts if s.mix == "base")
            or sum(s.mix == "base" for s in self.shortcuts) > 1
        ):
            raise UserError(
                "mix='base' stands for a model's own input, so it is used once, with layer=0;"
                " correct the plan"
            )
        for i, s in enumerate(self.shortcuts):
            if not 0 <= s.grain < self.num_grains:
                raise UserError(
                    f"shortcut {i} picks grain {s.grain}, but with tiles={self.tiles} the grains"
                    f" are 0 to {self.num_grains - 1}; use a smaller grain or more tiles"
                )
            if s.mix in ("attend", "enrich") and len(s.taps) * self.num_grains == 1:
                raise UserError(
                    f"shortcut {i} has mix={s.mix!r} but nothing to attend to: one tap and tiles=0;"
                    " set tiles=2 or add taps"
                )
        if len({self._tokens_of(s, 64 * POOLED) for s in self.shortcuts}) > 1:
            raise UserError(
                "the plan's shortcuts differ in their number of image tokens ('tokens' has"
                f" {self.num_grains} per patch, 'append' some more for each further tap, other"
                " mixers 1); use such a mixer for all shortcuts, with equally many taps, or for"
                " none"
            )

    def _tokens_of(self, shortcut: Shortcut, num_patches: int) -> int:
        if shortcut.mix == "append":
            return num_patches + (len(shortcut.taps) - 1) * -(-num_patches // POOLED)
        return num_patches * (self.num_grains if shortcut.mix == "tokens" else 1)

    @property
    def has_base_input(self) -> bool:
        """Whether the plan belongs to an upgraded model, whose input is its own."""
        return any(s.mix == "base" for s in self.shortcuts)

    @property
    def num_grains(self) -> int:
        """Features per coarse patch: itself and the tiles^2 fine patches under it."""
        return 1 + self.tiles**2

    @property
    def num_views(self) -> int:
        """Encoder passes per picture: the coarse view and tiles^2 fine ones."""
        return 1 + self.tiles**2

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers above 0 that receive features, ascending, each once."""
        return tuple(sorted({s.layer for s in self.shortcuts if s.layer > 0}))

    def image_tokens(self, num_patches: int) -> int:
        """Positions one picture takes in the prompt, for an encoder with `num_patches` patches per
        view.
        """
        return self._tokens_of(self.shortcuts[0], num_patches)

    def resolved_taps(self, vision_depth: int) -> tuple[int, ...]:
        """Every tap as a non-negative hidden-state number, ascending, each once."""
        return tuple(
            sorted({tap % (vision_depth + 1) for s in self.shortcuts for tap in s.flat_taps})
        )

    def fine_taps(self, vision_depth: int) -> tuple[int, ...]:
        """Those of them that some shortcut reads from the fine views; as far as the last one, fine
        views are encoded.
        """
        fine = [s for s in self.shortcuts if self.tiles and not s.is_coarse]
        return tuple(sorted({tap % (vision_depth + 1) for s in fine for tap in s.flat_taps}))

    def check(
        self,
        vision_depth: int,
        language_depth: int,
        *,
        vision="the encoder",
        language="the language model",
    ) -> Plan:
        """Return the plan if every shortcut can fire on these depths, else say which cannot."""
        for i, s in enumerate(self.shortcuts):
            for tap in s.flat_taps:
                if not -vision_depth - 1 <= tap <= vision_depth:
                    raise UserError(
                        f"shortcut {i} reads tap {tap}, but {vision} has hidden states 0 to"
                        f" {vision_depth} (or -1 to {-vision_depth - 1} from the end); use one of"
                        f" those or a plan made for {vision_depth} encoder layers"
                    )
            if not 0 <= s.layer < language_depth:
                raise UserError(
                    f"shortcut {i} adds to layer {s.layer}, but {language} has layers 0 to"
                    f" {language_depth - 1}, so it would never fire; use a smaller layer or a plan"
                    f" made for {language_depth} layers, e.g. sparsecut({vision_depth},"
                    f" {language_depth})"
                )
        return self

    def for_upgrade(self, *, fine: bool) -> Plan:
        """The plan for a model that feeds its input by itself: without weights there, and without
        effect until trained.

        The first shortcut into the input becomes the model's own. Where there is no gate, the
        others' projectors start at zero, or their gates where the projector is shared. fine:
        whether finer views can be had; without them, fine grains are left out.
        """
        main = next(i for i, s in enumerate(self.shortcuts) if s.layer == 0)
        own = Shortcut((), 0, "base")
        shortcuts = (own, *(s for i, s in enumerate(self.shortcuts) if i != main))
        tiles = self.tiles if fine and any(not s.is_coarse for s in shortcuts) else 0
        gate = self.gate or ("zero" if self.shared else "zero_projector")
        if (
            not shortcuts[1:]
            or gate not in ZERO_INIT_GATES
            or {s.mix for s in shortcuts} & {"tokens", "append"}
        ):
            raise UserError(
                "a finished model can only be upgraded by shortcuts beside its own input that"
                " start without effect and leave the prompt as it is, but the plan has"
                f" {len(shortcuts) - 1} of them, gate={self.gate!r} and the mixers"
                f" {', '.join(dict.fromkeys(s.mix for s in self.shortcuts))}; use for example"
                f" 'sparsecut', with a gate of {', '.join(ZERO_INIT_GATES)} and neither 'tokens'"
                " nor 'append'"
            )
        if not tiles and any(
            s.grain or (s.mix in ("attend", "enrich") and len(s.taps) == 1) for s in shortcuts
        ):
            raise UserError(
                "the plan reads finer views, but this model brings its own resolutions and takes no"
                " further views; use a plan without a grain and with several taps for 'attend' and"
                " 'enrich', or mix='channels'"
            )
        return replace(self, shortcuts=shortcuts, tiles=tiles, gate=gate)

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings: what JSON and YAML hold."""
        plain = asdict(self)
        for shortcut in plain["shortcuts"]:
            shortcut["taps"] = [
                list(tap) if isinstance(tap, tuple) else tap for tap in shortcut["taps"]
            ]
        plain["shortcuts"] = list(plain["shortcuts"])
        return plain

    @classmethod
    def from_dict(cls, plain: dict) -> Plan:
        """The plan that `to_dict` wrote; unknown keys are refused."""
        return build_dataclass(cls, plain, "the plan")
