"""Which upgraded models compile to one graph and can be exported, beside their bases.

python benchmarks/compiling.py                 # all: some minutes; writes docs/support.md
python benchmarks/compiling.py llava gemma3    # some of them, on screen only
"""

import copy
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import transformers
from helpers import bases
from support_page import format_reason, replace_section

from sparsecut import upgrade

HEADING = "Upgraded models: compiling and exporting"
INTRODUCTION = """\
`python benchmarks/compiling.py` made this section with transformers {transformers} and torch
{torch}. It takes a tiny random model of each family, alone and upgraded by the default plan with
random shortcuts. "yes" means that logits equal those of eager mode within 1e-4.

- *prefill*: `torch.compile(model, fullgraph=True, backend="eager")` of two prompts with images. It
  makes one graph, and no kernels from it.
- *step*: The same for the next token, with the cache of the prompt.
- *export*: `torch.export.export(model, (), inputs, strict=False)` of the prefill.

A base with "no" reads the sizes of its images as Python numbers, to cut or pack them. So its
prefill is not one graph, and that of an upgraded model cannot be either. Its steps after the
prefill are.
"""


def build_setting(name: str, is_upgraded: bool):
    """(model, inputs): the tiny model of a family, and two prompts with images."""
    base = bases.build_base(name)
    inputs = bases.build_inputs(name, base)
    if not is_upgraded:
        return base, inputs
    model, _ = upgrade(base)
    bases.randomize_fusion(model)
    return model, inputs | bases.build_fine_views(model, inputs)


def assert_close(output, expected) -> None:
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)


def compile_model(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def check_prefill(model, inputs) -> None:
    """The prefill is one graph."""
    assert_close(compile_model(model)(**inputs, use_cache=False), model(**inputs))


def check_step(model, inputs) -> None:
    """The next token, as `generate` calls the model for it, is one graph."""
    calls = []

    def record_call(module, args, kwargs):
        calls.append(copy.deepcopy(kwargs))

    base = getattr(model, "base", model)
    handle = base.register_forward_pre_hook(record_call, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    handle.remove()
    expected = model(**copy.deepcopy(calls[-1]))
    assert_close(compile_model(model)(**calls[-1]), expected)


def check_export(model, inputs) -> None:
    """The prefill can be exported, and the program answers as the model does."""
    inputs = inputs | {"use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False)
    assert_close(program.module()(**inputs), model(**inputs))


CHECKS = {"prefill": check_prefill, "step": check_step, "export": check_export}


@torch.no_grad()
def try_family(name: str) -> tuple[list[str], list[str]]:
    """Run the checks on a base and its upgraded model.

    Returns:
        The cells ("yes" or "no"), and a sentence for each check that only the upgraded model fails.
    """
    cells = []
    reasons = []
    for column, check in CHECKS.items():
        base_error = run_check(check, name, is_upgraded=False)
        error = run_check(check, name, is_upgraded=True)
        cells += ["no" if base_error else "yes", "no" if error else "yes"]
        if error and not base_error:
            reasons.append(format_reason(name, column, error))
    return cells, reasons


def run_check(check, name: str, *, is_upgraded: bool) -> Exception | None:
    """The error of a check, None where it passes."""
    torch._dynamo.reset()
    try:
        check(*build_setting(name, is_upgraded))
    except Exception as error:
        return error
    return None


def main() -> None:
    """Try the families, and write the section unless single families were named."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    titles = ["family"]
    for column in CHECKS:
        titles += [f"{column}, base", f"{column}, upgraded"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    notes = []
    for name in sys.argv[1:] or bases.FAMILY_NAMES:
        cells, reasons = try_family(name)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        notes += reasons
        print(lines[-1], *reasons, sep="\n", flush=True)
    if notes:
        notes = ["", "Where an upgraded model fails and its base does not:", "", *notes]
    if not sys.argv[1:]:
        head = INTRODUCTION.format(
            transformers=transformers.__version__, torch=torch.__version__.split("+")[0]
        )
        replace_section(HEADING, "\n".join([head, *lines, *notes]))


if __name__ == "__main__":
    main()
