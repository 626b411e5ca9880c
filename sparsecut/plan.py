"""The plan: which encoder layers are read, how they are mixed, and which decoder layers get them.

A plan is frozen data, equal to its JSON, and needs no torch. Four words are used everywhere:

- A *tap* is the number of an encoder state, as in Hugging Face `hidden_states`. 0 is the patch
  embedding, k the output of block k counted from 1. Negative numbers count from the end: -2 is the
  last block but one.
- A *layer* is the number of a decoder layer, from 0. Features are added before the layer. Layer 0
  is the input embedding, whose image positions start at zero.
- A *view* is one encoder-sized image cut from an input image. The coarse view is the whole image,
  the fine views are the cells of a tiles x tiles grid of it.
- A *grain* is one resolution of a patch. Grain 0 is the patch of the coarse view, grains 1 to
  tiles^2 are the fine patches that show the same part of the image, row by row.

The names that `Shortcut.mix` and `Plan.gate` may have are the keys of `MIXERS` and `GATES`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from .kinds import GATES, MIXERS, SOME_PATCHES, Mixer
from .kinds import Gate as Gate
from .schema import UserError, build_dataclass, is_whole_number, make_tuples, nearest

Tap = int | tuple[int, ...]


@dataclass(frozen=True)
class Shortcut:
    """Read `taps` of the encoder, mix them, and add the result before decoder layer `layer`.

    Attributes:
        taps: Encoder states. A tuple among them stands for the mean of its states.
        layer: The decoder layer that receives the features.
        mix: A key of `MIXERS`. "base" has no taps and no weights here. It stands for what a
            pretrained VLM feeds to its input itself, where the plan's other shortcuts upgrade it.
        grain: The grain that a mixer reads which reads only one (`pick`).
    """

    taps: tuple[Tap, ...]
    layer: int
    mix: str = "pick"
    grain: int = 0

    def __post_init__(self) -> None:
        make_tuples(self, "taps")
        taps = tuple(tuple(tap) if isinstance(tap, list) else tap for tap in self.taps)
        object.__setattr__(self, "taps", taps)
        if self.mix not in tuple(MIXERS):  # a list from a file has no hash
            raise UserError(
                f"mix {self.mix!r} is not known{nearest(self.mix, MIXERS)}; allowed are"
                f" {', '.join(MIXERS)}, and mixers that were added to sparsecut.plan.MIXERS"
            )
        numbers = (*self.flat_taps, self.layer, self.grain)
        if not all(is_whole_number(number) for number in numbers):
            raise UserError(
                f"taps, layer and grain must be whole numbers, but taps={self.taps!r},"
                f" layer={self.layer!r} and grain={self.grain!r} were given; write for example"
                " Shortcut(taps=(-2,), layer=0)"
            )
        if () in self.tap_groups or bool(taps) == (self.mix == "base"):
            raise UserError(
                f"taps={self.taps!r} was given with mix={self.mix!r}; give at least one tap, or"
                " taps=() with mix='base' only"
            )
        if self.grain and self.mixer.grains != "one":
            raise UserError(
                f"grain={self.grain} has no effect with mix={self.mix!r}, which reads"
                f" {self.mixer.grains} grains; leave grain at 0 or use mix='pick'"
            )

    @property
    def mixer(self) -> Mixer:
        """The facts of its mixer."""
        return MIXERS[self.mix]

    @property
    def tap_groups(self) -> tuple[tuple[int, ...], ...]:
        """Each tap as a tuple of the states whose mean it is."""
        return tuple(tap if isinstance(tap, tuple) else (tap,) for tap in self.taps)

    @property
    def flat_taps(self) -> tuple[int, ...]:
        """Every state that is read, those of means included, in the order given."""
        return sum(self.tap_groups, ())

    @property
    def is_coarse(self) -> bool:
        """Whether it reads the coarse view only."""
        grains = self.mixer.grains
        return grains == "coarse" or (grains == "one" and self.grain == 0)

    def count_tokens(self, num_grains: int, num_patches: int, rows: int | None = None) -> int:
        """Return the image tokens of one image, for views of `num_patches` patches in `rows`."""
        num_windows = self.mixer.count_windows(num_patches, rows)
        return self.mixer.count_tokens(len(self.taps), num_grains, num_windows)


@dataclass(frozen=True)
class Plan:
    """A model's shortcuts and what they have in common.

    Attributes:
        shortcuts: At least one of them adds to layer 0.
        tiles: 0 reads the coarse view only. t >= 2 adds a t x t grid of fine views, so that an
            image becomes 1 + t^2 views.
        shared: Whether shortcuts of the same kind share one mixer and projector. Otherwise each
            has its own.
        norm: Whether a LayerNorm without parameters is applied to every tap before mixing.
        gate: A key of `GATES`. None adds features as they are.
        rank: The inner width of every projector but the input's. Where projectors are shared, each
            shortcut gets a correction of that rank to the shared projector instead.
        tied: Whether shortcuts that read the same taps in the same way share all their weights but
            gates, corrections too. Their features are then computed once for all their layers.
    """

    shortcuts: tuple[Shortcut, ...]
    tiles: int = 0
    shared: bool = False
    norm: bool = True
    gate: str | None = None
    rank: int | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        make_tuples(self, "shortcuts")
        for shortcut in self.shortcuts:
            if not isinstance(shortcut, Shortcut):
                raise UserError(
                    f"shortcuts holds {shortcut!r}, which is no Shortcut; Plan.from_dict takes keys"
                    " and values"
                )
        self._check_settings()
        self._check_input()
        for number, shortcut in enumerate(self.shortcuts):
            self._check_grains(number, shortcut)
        self._check_tokens()

    def _check_settings(self) -> None:
        if self.gate not in tuple(GATES):
            known = [gate for gate in GATES if gate is not None]
            raise UserError(
                f"gate {self.gate!r} is not known{nearest(self.gate, known)}; allowed are"
                f" {', '.join(known)}, and gates that were added to sparsecut.plan.GATES"
            )
        if self.rank is not None and not (is_whole_number(self.rank) and self.rank >= 1):
            raise UserError(
                f"rank is {self.rank!r}, but must be a whole number of at least 1, or left out"
            )
        if not all(isinstance(value, bool) for value in (self.shared, self.norm, self.tied)):
            raise UserError(
                f"shared, norm and tied are true or false, but shared={self.shared!r},"
                f" norm={self.norm!r} and tied={self.tied!r} were given"
            )
        if self.shared and GATES[self.gate].zero_projector:
            raise UserError(
                f"gate={self.gate!r} starts each shortcut's own projector at zero, but shared=True"
                " gives all of them the input's; use shared=False or gate='zero'"
            )
        self._check_tiles()

    def _check_tiles(self) -> None:
        if not is_whole_number(self.tiles) or self.tiles < 0 or self.tiles == 1:
            raise UserError(
                f"tiles is {self.tiles!r}, but must be 0 (coarse view only) or at least 2 (a grid"
                " of fine views)"
            )

    def _check_input(self) -> None:
        if not any(s.layer == 0 for s in self.shortcuts):
            raise UserError(
                "no shortcut of the plan adds to layer 0, so image positions would enter the"
                " language model as zeros; add one, for example Shortcut(taps=(-2,), layer=0)"
            )
        base_layers = [s.layer for s in self.shortcuts if s.mix == "base"]
        if base_layers not in ([], [0]):
            raise UserError(
                f"mix='base' adds to the layers {base_layers}, but it stands for a model's own"
                " input; use it once, with layer=0"
            )

    def _check_grains(self, number: int, shortcut: Shortcut) -> None:
        if not 0 <= shortcut.grain < self.num_grains:
            raise UserError(
                f"shortcut {number} picks grain {shortcut.grain}, but with tiles={self.tiles} the"
                f" grains are 0 to {self.num_grains - 1}; use a smaller grain or more tiles"
            )
        if shortcut.mixer.needs_context and len(shortcut.taps) * self.num_grains == 1:
            raise UserError(
                f"shortcut {number} has mix={shortcut.mix!r}, but with one tap and tiles=0 there is"
                " nothing to attend to; set tiles=2 or add taps"
            )

    def _check_tokens(self) -> None:
        counts = [s.count_tokens(self.num_grains, SOME_PATCHES) for s in self.shortcuts]
        if len(set(counts)) > 1:
            pairs = zip(self.shortcuts, counts, strict=True)
            listed = [f"{s.mix} {count / SOME_PATCHES:g}" for s, count in pairs]
            raise UserError(
                "the plan's shortcuts differ in their image tokens for each coarse patch"
                f" ({', '.join(dict.fromkeys(listed))}); use mixers, and numbers of taps, that"
                " agree"
            )

    @property
    def input_number(self) -> int:
        """The number of the first shortcut into the input. It has no gate and no correction."""
        return next(i for i, s in enumerate(self.shortcuts) if s.layer == 0)

    @property
    def has_base_input(self) -> bool:
        """Whether the plan belongs to an upgraded model, which feeds its input itself."""
        return any(s.mix == "base" for s in self.shortcuts)

    @property
    def needs_prompt(self) -> bool:
        """Whether what is added depends on the prompt as well as on the image."""
        return any(s.mixer.needs_prompt for s in self.shortcuts)

    @property
    def num_grains(self) -> int:
        """Features of one patch: the coarse one and the tiles^2 fine ones under it."""
        return 1 + self.tiles**2

    @property
    def num_views(self) -> int:
        """Encoder passes for one image: the coarse view and tiles^2 fine ones."""
        return 1 + self.tiles**2

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers above 0 that receive features, ascending, each once."""
        return tuple(sorted({s.layer for s in self.shortcuts if s.layer > 0}))

    @property
    def fused_layers(self) -> tuple[int, ...]:
        """Layers that the fusion makes features for, ascending, each once.

        These are `(0, *layers)`. Where the base feeds its input itself, 0 is among them only if
        another shortcut adds to the input, too.
        """
        return tuple(sorted({s.layer for s in self.shortcuts if s.mix != "base"}))

    def image_tokens(self, num_patches: int, rows: int | None = None) -> int:
        """Return the prompt positions of one image.

        Args:
            num_patches: Patches of a view.
            rows: Rows that they stand in. By default as many as columns.
        """
        return self.shortcuts[0].count_tokens(self.num_grains, num_patches, rows)

    def resolved_taps(self, vision_depth: int) -> tuple[int, ...]:
        """Return every tap as a number from 0 to `vision_depth`, ascending, each once."""
        return _resolve(self.shortcuts, vision_depth)

    def fine_taps(self, vision_depth: int) -> tuple[int, ...]:
        """Return the resolved taps that are read from fine views, too.

        Fine views run through the encoder as far as the last of them.
        """
        fine = [s for s in self.shortcuts if self.tiles and not s.is_coarse]
        return _resolve(fine, vision_depth)

    def check(
        self,
        vision_depth: int,
        language_depth: int,
        *,
        vision: str = "the encoder",
        language: str = "the language model",
    ) -> Plan:
        """Return this plan if every shortcut can fire on models of these depths.

        Args:
            vision_depth: Number of encoder blocks.
            language_depth: Number of decoder layers.
            vision: What errors call the encoder.
            language: What errors call the language model.

        Raises:
            UserError: A tap or a layer does not exist.
        """
        self._check_tied(vision_depth)
        for number, shortcut in enumerate(self.shortcuts):
            for tap in shortcut.flat_taps:
                if not -vision_depth - 1 <= tap <= vision_depth:
                    raise UserError(
                        f"shortcut {number} reads tap {tap}, but {vision} has hidden states 0 to"
                        f" {vision_depth} (or -1 to {-vision_depth - 1} from the end); use one of"
                        f" those or a plan made for {vision_depth} encoder layers"
                    )
            if not 0 <= shortcut.layer < language_depth:
                raise UserError(
                    f"shortcut {number} adds to layer {shortcut.layer}, but {language} has layers 0"
                    f" to {language_depth - 1}; use a smaller layer or a plan made for"
                    f" {language_depth} layers, for example sparsecut({vision_depth},"
                    f" {language_depth})"
                )
        return self

    def _check_tied(self, vision_depth: int) -> None:
        """Refuse a shortcut that must start at zero, or be narrow, and is tied to the input's."""
        is_own = GATES[self.gate].zero_projector or (self.rank is not None and not self.shared)
        if not self.tied or not is_own:
            return
        keys = []
        for s in self.shortcuts:
            groups = []
            for group in s.tap_groups:
                groups.append([tap % (vision_depth + 1) for tap in group])
            keys.append((groups, s.mix, s.grain))
        if keys.count(keys[self.input_number]) > 1:
            raise UserError(
                "tied=True gives a shortcut of the taps"
                f" {list(self.shortcuts[self.input_number].taps)} the input's projector, but"
                f" gate={self.gate!r} and rank={self.rank!r} ask for another start or width; use"
                " shared=True with gate='zero', or other taps"
            )

    def for_upgrade(self, *, fine: bool) -> Plan:
        """Return the plan for a pretrained VLM, which feeds its input itself.

        The first shortcut into the input becomes the model's own. The others start without effect:
        where the plan has no gate, their projectors start at zero, or gates do where the projector
        is shared.

        Args:
            fine: Whether the model can be given fine views. Without them, fine grains are left out.

        Raises:
            UserError: The plan has no other shortcut, would have an effect at the start, changes
                the number of image tokens, or cannot do without fine views.
        """
        others = [s for i, s in enumerate(self.shortcuts) if i != self.input_number]
        gate = self.gate or ("zero" if self.shared else "zero_projector")
        self._check_upgrade(others, gate)
        tiles = self.tiles if fine and any(not s.is_coarse for s in others) else 0
        if not tiles and any(_needs_fine_views(s) for s in others):
            raise UserError(
                "the plan reads fine views, but this model brings its own resolutions and takes no"
                " further views; use a plan without `grain`, with several taps for each mixer that"
                " attends, or with mix='channels'"
            )
        shortcuts = (Shortcut((), 0, "base"), *others)
        return replace(self, shortcuts=shortcuts, tiles=tiles, gate=gate)

    def _check_upgrade(self, others: list[Shortcut], gate: str) -> None:
        if not others:
            raise UserError(
                "the plan has no shortcut beside the one into the input, which an upgraded model"
                " has already; use a plan with more, for example 'sparsecut'"
            )
        by_prompt = [s.mix for s in others if s.mixer.needs_prompt]
        if by_prompt:
            raise UserError(
                f"mix={by_prompt[0]!r} reads the prompt, but an upgraded model encodes its images"
                " before the prompt is known; use another mixer, for example 'blend', or a model"
                " that `build` makes"
            )
        if not GATES[gate].starts_without_effect:
            allowed = [name for name in GATES if GATES[name].starts_without_effect]
            raise UserError(
                f"gate={gate!r} would change the model at once, but an upgrade must start without"
                f" effect; use one of {', '.join(allowed)}"
            )
        if self.image_tokens(SOME_PATCHES) != SOME_PATCHES:
            raise UserError(
                f"mix={self.shortcuts[0].mix!r} changes the number of image tokens, but an upgrade"
                " must leave the prompt as long as it is; use another mixer, for example"
                " 'channels'"
            )

    def to_dict(self) -> dict:
        """Return plain lists, numbers and strings, as JSON and YAML hold them."""
        values = asdict(self)
        if not self.tied:  # as in files of earlier versions
            del values["tied"]
        values["shortcuts"] = list(values["shortcuts"])
        for shortcut in values["shortcuts"]:
            taps = [list(tap) if isinstance(tap, tuple) else tap for tap in shortcut["taps"]]
            shortcut["taps"] = taps
        return values

    @classmethod
    def from_dict(cls, values: dict) -> Plan:
        """Return the plan that `to_dict` wrote. Unknown keys are refused."""
        return build_dataclass(cls, values, "the plan")


def _resolve(shortcuts: list[Shortcut] | tuple[Shortcut, ...], vision_depth: int) -> tuple:
    taps = {tap % (vision_depth + 1) for s in shortcuts for tap in s.flat_taps}
    return tuple(sorted(taps))


def _needs_fine_views(shortcut: Shortcut) -> bool:
    is_alone = shortcut.mixer.needs_context and len(shortcut.taps) == 1
    return shortcut.grain > 0 or is_alone
