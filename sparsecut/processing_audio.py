"""Sounds to spectrograms, texts about them to token ids: the processor of a model whose encoder
listens.
"""

from __future__ import annotations

from transformers.processing_utils import MultiModalData, ProcessorMixin

from .processing import SparseCutProcessor
from .schema import UserError


class SparseCutAudioProcessor(ProcessorMixin):
    r"""An encoder's feature extractor, such as Whisper's, and a tokenizer, with one placeholder
    per sound in a text.

    num_audio_tokens: positions per sound. audio_token: the placeholder, expanded to as many copies.
    Its spectrograms are called `pixel_values`, [sounds, 1, mels, frames], because they go where a
    picture's views go: one view, one row of moments. Recipes, evaluation and chat read pictures; a
    model that listens is trained by a loop or a Trainer of one's own.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        num_audio_tokens=None,
        audio_token="<audio>",
        chat_template=None,
    ):
        self.num_audio_tokens, self.audio_token = num_audio_tokens, audio_token
        # generation continues from the last column; a saved tokenizer forgets this
        tokenizer.padding_side = "left"
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or self.audio_token_id == tokenizer.unk_token_id:
            raise UserError(
                f"the tokenizer has no token {audio_token!r}; add it with"
                f" tokenizer.add_special_tokens({{'additional_special_tokens': [{audio_token!r}]}})"
                " or name another one"
            )
        template = chat_template or SparseCutProcessor.flattening(tokenizer, audio_token).replace(
            "'image'", "'audio'"
        )
        super().__init__(feature_extractor, tokenizer, chat_template=template)

    def _process_audio(self, audio, **kwargs):
        """Spectrograms of sounds and what each placeholder becomes; ValueError for sounds that
        would be cut off.
        """
        longest, most = max(len(sound) for sound in audio), self.feature_extractor.n_samples
        if longest > most:
            raise UserError(
                f"a sound has {longest} samples, but the encoder listens to {most}"
                f" ({self.feature_extractor.chunk_length} s at"
                f" {self.feature_extractor.sampling_rate} Hz), and the rest would be lost; cut it"
                " into parts"
            )
        # The other keywords (padding, truncation) are the texts': an encoder listens to one length.
        rate = kwargs.get("sampling_rate") or self.feature_extractor.sampling_rate
        features = self.feature_extractor(audio, sampling_rate=rate, return_tensors="pt")[
            "input_features"
        ]
        pixels = features.unsqueeze(1)
        return {"pixel_values": pixels}, [self.audio_token * self.num_audio_tokens] * len(audio)

    def _get_num_multimodal_tokens(self, audio_lengths=None, **kwargs):
        return MultiModalData(num_audio_tokens=[self.num_audio_tokens] * len(audio_lengths or []))

    @property
    def model_input_names(self):
        """Names of what `__call__` returns."""
        return [*self.tokenizer.model_input_names, "pixel_values"]


def check_extractor(feature_extractor, grid) -> None:
    """Refuse a feature extractor whose spectrograms are not those of the encoder's grid."""
    made = feature_extractor.feature_size, feature_extractor.nb_max_frames
    if made != grid.view:
        raise UserError(
            f"the feature extractor makes {made[0]} mels and {made[1]} frames of a sound, but the"
            f" encoder takes {grid.view[0]} and {grid.view[1]}; set its feature_size, or its"
            " chunk_length in seconds"
        )
