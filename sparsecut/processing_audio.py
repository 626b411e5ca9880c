"""The processor of audio: clips to spectrograms, and text to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .audio import AudioSource, Clip, open_audio, resample, to_samples
from .chat_markup import drop_end_token, get_placeholder_id, make_chat_template
from .saved_code import SavesCode
from .schema import UserError


class SparseCutAudioProcessor(SavesCode, ProcessorMixin):
    r"""Prepares audio and text for a SparseCut model with an audio encoder.

    It joins a tokenizer and the feature extractor of an encoder such as Whisper's. A spectrogram
    takes the place of an image's views: `pixel_values` are [clips, 1, mels, frames]. Every clip
    takes the same number of tokens. What is shorter than the encoder's window is filled up with
    silence; what is longer is refused, as cutting it would need a placeholder for every part.

    Attributes:
        num_audio_tokens: positions per audio clip in the prompt.
        audio_token: placeholder in the text, one per clip; it becomes `num_audio_tokens` tokens.
        audio_token_id: id of the placeholder.
        medium: what the model takes beside text.
        num_views, tiles, is_any_size: those of a clip: one view, no fine ones, one length.
    """

    medium = "audio"
    num_views = 1
    tiles = 0

    is_any_size = False  # every clip takes as many tokens

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        num_audio_tokens: Any = None,
        audio_token: Any = "<audio>",
        chat_template: Any = None,
    ) -> None:
        self.num_audio_tokens = num_audio_tokens
        self.audio_token = audio_token
        # Generation continues from the last column. A saved tokenizer forgets this setting.
        tokenizer.padding_side = "left"
        self.audio_token_id = get_placeholder_id(tokenizer, audio_token)
        drop_end_token(tokenizer)
        if not chat_template:
            chat_template = make_chat_template(tokenizer, audio_token)
            chat_template = chat_template.replace("'image'", "'audio'")
            chat_template = chat_template.replace("are images or", "are audio or")
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    # Recipes, evaluation, chat and the server know one medium beside text, by the names of images.

    @property
    def image_token(self) -> str:
        """The placeholder of a clip."""
        return self.audio_token

    @property
    def image_token_id(self) -> int:
        """The placeholder's id."""
        return self.audio_token_id

    @property
    def num_image_tokens(self) -> int:
        """Positions of a clip."""
        return self.num_audio_tokens

    def expand(self, text: str) -> str:
        """Repeat every placeholder once per audio token."""
        return text.replace(self.audio_token, self.audio_token * self.num_audio_tokens)

    def prepare_images(self, clips: Sequence) -> dict[str, Tensor]:
        """Make what the model reads of clips: `pixel_values`."""
        return {"pixel_values": self.pixels(clips)}

    def pixels(self, clips: Sequence) -> Tensor:
        """Return the spectrograms of clips, float32 [clips, 1, mels, frames].

        Args:
            clips: What `open_audio` takes, or mono arrays and tensors at the extractor's rate.

        Raises:
            UserError: A clip cannot be read, or is longer than the encoder's window.
        """
        extractor = self.feature_extractor
        if not len(clips):
            num_frames = extractor.n_samples // extractor.hop_length
            return torch.empty(0, 1, extractor.feature_size, num_frames)
        samples = [self.read(clip) for clip in clips]
        rate = extractor.sampling_rate
        features = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
        return features.unsqueeze(1)

    def read(self, clip: Any) -> np.ndarray:
        """Return a clip's samples at the extractor's rate, float32; arguments as above."""
        rate = self.feature_extractor.sampling_rate
        is_file = isinstance(clip, AudioSource)
        clip = open_audio(clip) if is_file else Clip(to_samples(clip), rate)
        self.check_length(clip)
        return resample(clip, rate)

    def check_length(self, clip: Clip) -> None:
        """Raise UserError for a clip that is longer than the encoder's window."""
        extractor = self.feature_extractor
        rate = extractor.sampling_rate
        # Resampling may round one sample up.
        if len(clip.samples) * rate <= extractor.n_samples * clip.rate:
            return
        raise UserError(
            f"an audio clip has {len(clip.samples)} samples ({clip.seconds:.1f} s at {clip.rate}"
            f" Hz), but the encoder takes at most {extractor.n_samples} samples"
            f" ({extractor.n_samples / rate:g} s at {rate} Hz); cut the clip into parts, and give"
            f" each its own {self.audio_token}"
        )

    def __call__(
        self, audio: Any = None, text: str | list[str] | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Convert texts to token ids and their clips to spectrograms.

        Args:
            audio: one clip, a list of clips in the order of the placeholders, or one list per text.
                Clips are as in `pixels`.
            text: one text or several.
            kwargs: those of Hugging Face processors, such as `padding` and `return_tensors`.

        Returns:
            input_ids and attention_mask [B, L]. With audio also pixel_values
            [clips, 1, mels, frames].

        Raises:
            UserError: A text has more or fewer placeholders than clips, or a clip cannot be read.
        """
        for name in ("images", "videos"):
            if kwargs.pop(name, None) is not None:
                raise UserError(
                    f"{name} were given, but the model takes audio; give audio=..., or a model with"
                    " a vision encoder"
                )
        rate = kwargs.pop("sampling_rate", None)
        own_rate = self.feature_extractor.sampling_rate
        rows = _list_clips(audio)
        if text is not None:
            self._check_placeholders(rows, [text] if isinstance(text, str) else text)
        samples = []
        for clip in _flatten(rows):
            is_array = not isinstance(clip, AudioSource)
            samples.append(
                self.read(Clip(to_samples(clip), rate or own_rate) if is_array else clip)
            )
        return super().__call__(audio=samples or None, text=text, **kwargs)

    def validate_inputs(self, text: Any = None, audio: Any = None, **others: Any) -> None:
        """Check that there is something; `__call__` has checked the placeholders."""
        if text is None and audio is None:
            raise UserError("neither text nor audio was given; give one of them")

    def _check_placeholders(self, rows: list, texts: Sequence[str]) -> None:
        counts = [text.count(self.audio_token) for text in texts]
        if any(isinstance(row, list) for row in rows):
            found = [len(row) if isinstance(row, list) else 1 for row in rows]
        else:
            counts, found = [sum(counts)], [len(rows)]
        if counts != found:
            raise UserError(
                f"the texts have {counts} placeholders {self.audio_token}, but there are {found}"
                " audio clips; write one placeholder per clip"
            )

    def _process_audio(self, audio: Any, **kwargs: Any) -> Any:
        """Spectrograms, and the text that replaces each placeholder."""
        # The other keywords (padding, truncation) are for text: all spectrograms have one length.
        replacements = [self.audio_token * self.num_audio_tokens] * len(audio)
        return {"pixel_values": self.pixels(audio)}, replacements

    def _get_num_multimodal_tokens(self, audio_lengths: Any = None, **kwargs: Any) -> Any:
        return MultiModalData(num_audio_tokens=[self.num_audio_tokens] * len(audio_lengths or []))

    @property
    def model_input_names(self) -> Any:
        """Names of what `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]


def _list_clips(audio: Any) -> list:
    """The clips of a call as a flat list, or one list for each text where they were given so."""
    if audio is None:
        return []
    is_batch = isinstance(audio, np.ndarray | Tensor) and audio.ndim == 2
    if is_batch:
        return list(audio)
    if isinstance(audio, Clip | str | Path | bytes | dict | np.ndarray | Tensor):
        return [audio]
    audio = list(audio)
    if audio and isinstance(audio[0], Number):
        return [np.asarray(audio)]
    rows = []
    for item in audio:
        is_row = isinstance(item, list | tuple) and not isinstance(item, Clip)
        is_numbers = is_row and bool(item) and isinstance(item[0], Number)
        rows.append(np.asarray(item) if is_numbers else list(item) if is_row else item)
    return rows


def _flatten(rows: list) -> list:
    clips = []
    for row in rows:
        clips += row if isinstance(row, list) else [row]
    return clips
