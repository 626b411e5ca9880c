"""Benchmarks: scores as pure functions that equal the benchmarks' own scripts, and the tasks that
ask their questions.

Scores take what the benchmarks' files hold and return what their scripts say. The rules of those scripts that surprise are kept and named,
because a score is compared with published ones.
"""

from .multiple_choice_metrics import infer_option, mmbench, scienceqa, seed
from .open_ended_metrics import anls, textvqa, textvqa_text, vqa, vqa_text
from .single_word_metrics import gqa, mme, nlvr, pope

__all__ = [
    "anls",
    "gqa",
    "infer_option",
    "mmbench",
    "mme",
    "nlvr",
    "pope",
    "scienceqa",
    "seed",
    "textvqa",
    "textvqa_text",
    "vqa",
    "vqa_text",
]
