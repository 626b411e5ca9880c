"""Which upgraded models can be compiled as one graph and exported: a tiny random one of each
family, beside its base.

python benchmarks/compiling.py                  # every family, some minutes; a section of docs/support.md
python benchmarks/compiling.py llava gemma3     # some of them, on screen only
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
from grid import reason
from helpers import bases
from support_page import replace_section

from sparsecut import upgrade

HEADING = "Upgraded models: compiling and exporting"
INTRODUCTION = """\
Made by `python benchmarks/compiling.py` with transformers {transformers} and torch {torch}: a tiny random model of each family, by
itself and upgraded by the default plan with random shortcuts. "yes" means logits equal those of eager mode within 1e-4.

- *prompt*: `torch.compile(model, fullgraph=True, backend="eager")` (one graph, no kernels made of it) of a pass with two
  prompts and their pictures
- *step*: the same of the pass over the next word, with the cache of the prompt
- *export*: `torch.export.export(model, (), inputs, strict=False)` of the prompt pass

Where the base says "no", it reads the sizes of its pictures as Python numbers to cut or pack them, so its prompt pass is not one
graph, and an upgraded one cannot be either; its steps after the prompt can.
"""


def setting(name: str, upgraded: bool):
    """(model, inputs): a family's tiny model and two prompts with pictures."""
    base = bases.build_base(name)
    inputs = bases.build_inputs(name, base, bases.build_images(name))
    if not upgraded:
        return base, inputs
    model, _ = upgrade(base)
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, inputs | bases.build_fine_views(model, inputs)


def close(found, expected) -> None:
    """AssertionError where logits differ."""
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def prompt(model, inputs):
    """The prompt pass is one graph."""
    close(
        torch.compile(model, fullgraph=True, backend="eager")(**inputs, use_cache=False),
        model(**inputs),
    )


def step(model, inputs):
    """The pass over the next word, as `generate` calls it, is one graph."""
    calls, base = [], getattr(model, "base", model)
    keep = base.register_forward_pre_hook(
        lambda m, args, named: calls.append(copy.deepcopy(named)), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    keep.remove()
    expected = model(**copy.deepcopy(calls[-1]))
    close(torch.compile(model, fullgraph=True, backend="eager")(**calls[-1]), expected)


def export(model, inputs):
    """The prompt pass can be exported, and the program answers as the model does."""
    inputs = inputs | {"use_cache": False}
    close(torch.export.export(model, (), inputs, strict=False).module()(**inputs), model(**inputs))


CHECKS = {"prompt": prompt, "step": step, "export": export}


@torch.no_grad()
def try_family(name: str) -> tuple[list[str], list[str]]:
    """Cells of a family, and a sentence for each way in which the upgraded model fails where its
    base does not.
    """
    cells, reasons = [], []
    for column, check in CHECKS.items():
        for upgraded in (False, True):
            torch._dynamo.reset()
            try:
                check(*setting(name, upgraded))
                cells.append("yes")
            except Exception as error:
                cells.append("no")
                if upgraded and cells[-2] == "yes":
                    reasons.append(f"- `{name}`, {column}: {reason(error)}")
    return cells, reasons


def main():
    """Try the families named, or all; all of them are written down."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names, lines, reasons = sys.argv[1:] or bases.FAMILY_NAMES, [], []
    for name in names:
        cells, why = try_family(name)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
        reasons += why
        print(lines[-1], *why, sep="\n", flush=True)
    titles = [f"{column}, {which}" for column in CHECKS for which in ("base", "upgraded")]
    table = ["| family | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|", *lines]
    if not sys.argv[1:]:
        introduction = INTRODUCTION.format(
            transformers=transformers.__version__, torch=torch.__version__
        )
        text = "\n".join(
            [
                introduction,
                *table,
                *(
                    ["", "Where an upgraded model fails and its base does not:", "", *reasons]
                    if reasons
                    else []
                ),
            ]
        )
        replace_section(HEADING, text)


if __name__ == "__main__":
    main()
