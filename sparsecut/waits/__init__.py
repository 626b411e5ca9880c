"""No silent wait: what a long step shows, and where a command that is stopped says it stopped.

    with show_step("drawing images", total=len(keys)) as step:
        for key in step.count(keys):
            draw(key)

Steps may lie in one another; all share one display on stderr. On a terminal it is a bar for each
step, which goes when the step ends. Elsewhere it is a line after four seconds, and then one every
half minute. A step of known total shows the time left. Steps that end at once show nothing.

`SPARSECUT_DISABLE_PROGRESS_BARS=1`, `disable_progress_bars()`, and the same settings of
huggingface_hub, datasets and transformers switch it off.
"""

from .display import disable_progress_bars, enable_progress_bars, pause_display
from .interrupts import (
    Terminated,
    end_children_at_error,
    ignore_ctrl_c,
    interrupt_at_sigterm,
)
from .model_loading import show_loading
from .step import Step
from .steps import describe_place, show_step

__all__ = [
    "Step",
    "Terminated",
    "describe_place",
    "disable_progress_bars",
    "enable_progress_bars",
    "end_children_at_error",
    "ignore_ctrl_c",
    "interrupt_at_sigterm",
    "pause_display",
    "show_loading",
    "show_step",
]
