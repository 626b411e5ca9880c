"""Benchmark tasks, and their scores as pure functions.

The scores take what the benchmarks' files hold and return what the benchmarks' own scripts compute.
Surprising rules of those scripts are followed and named, because a score is compared with published
ones.
"""

from .multiple_choice_metrics import infer_option, mmbench, scienceqa, seed
from .open_ended_metrics import anls, normalize_textvqa, normalize_vqa, textvqa, vqa
from .single_word_metrics import gqa, mme, nlvr, pope

__all__ = [
    "anls",
    "gqa",
    "infer_option",
    "mmbench",
    "mme",
    "nlvr",
    "normalize_textvqa",
    "normalize_vqa",
    "pope",
    "scienceqa",
    "seed",
    "textvqa",
    "vqa",
]
