"""Processors of pretrained VLMs where torchvision is missing, which many need for videos only."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from transformers import ProcessorMixin
from transformers.models.auto import video_processing_auto
from transformers.video_processing_utils import VideoProcessorMixin

from .schema import UserError

KIND = "video_processor_type"


class AbsentVideos(VideoProcessorMixin):
    """Stands for a video processor: it keeps the settings, so that they are saved again."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they were read, with the class that they are of."""
        settings = {**super().to_dict(), KIND: getattr(self, KIND, None)}
        return {key: value for key, value in settings.items() if value is not None}

    def preprocess(self, videos: Any, **kwargs: Any) -> Any:
        """Raise UserError."""
        raise UserError(
            "videos need the package torchvision, which is not installed here; install it: pip"
            " install torchvision"
        )


@contextmanager
def read_without_videos() -> Iterator[None]:
    """Let transformers load processors without that of videos, where torchvision is missing."""
    if find_spec("torchvision") is not None:
        yield
        return
    automatic = video_processing_auto.AutoVideoProcessor
    check = ProcessorMixin.check_argument_for_proper_class

    @functools.wraps(check)
    def check_others(self: Any, name: str, part: Any) -> Any:
        return AbsentVideos if isinstance(part, AbsentVideos) else check(self, name, part)

    video_processing_auto.AutoVideoProcessor = AbsentVideos
    ProcessorMixin.check_argument_for_proper_class = check_others
    try:
        yield
    finally:
        video_processing_auto.AutoVideoProcessor = automatic
        ProcessorMixin.check_argument_for_proper_class = check
