"""What benchmarks/gpu.py measured, as a Markdown page; it can be written again from the JSON.

python benchmarks/gpu_table.py runs/gpu/bench.json
"""

import json
import os
import sys
from pathlib import Path


def write_result(result: dict, out: Path) -> None:
    """Write the JSON and its page; a run that is killed meanwhile leaves the former ones."""
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(result, indent=1) + "\n", ".md": markdown(result)}
    for ending, text in texts.items():
        unfinished = out.with_suffix(f"{ending}.part")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, out.with_suffix(ending))


def markdown(result: dict) -> str:
    """The page: machine and date, a table of prompts and new tokens, one of training steps, and
    notes.
    """
    settings, machine, plans = result["settings"], result["machine"], result["plans"]
    batches, first = settings["batches"], next(iter(plans))
    lines = [
        f"# Plans on {machine['device']}, {result['date']}",
        "",
        (
            f"Encoder {result['vision']}, language model {result['language']}, random weights,"
            f" {result['dtype']}, attention {result['attention']}, torch {machine['torch']}, CUDA"
            f" {machine['cuda']}. A bfloat16 matrix product reached {result['matmul_tflops']:.4g}"
            " TFLOP/s. Medians over rounds in turns, spread between quartiles; x is the ratio to"
            f" {first} in the same rounds, of times. Memory includes the weights."
        ),
        "",
        *_table(plans, _inference_columns(batches)),
        "",
    ]
    if not settings["skip_training"]:
        lines += [
            (
                f"Training: {settings['train_batch']} rows of one image and"
                f" {settings['train_text']} words, activation checkpointing, AdamW with weights,"
                " gradients and moments in the dtype above; tokens count images and text."
            ),
            "",
            *_table(plans, _training_columns()),
            "",
        ]
    missing = [
        f"{name}, {part}: {why}."
        for name, plan in plans.items()
        for part, why in plan["missing"].items()
    ]
    lines += [f"- {sentence}" for sentence in (*result["notes"], *missing)]
    if settings["tiny"]:
        lines += ["- Tiny sizes, to see that it runs: these figures mean nothing."]
    if machine["cuda"] is None:
        lines += [
            "- Without CUDA, memory is the process's highest so far, whichever plan needed it."
        ]
    if result.get("vllm"):  # its own page has one heading
        lines += ["", result["vllm"]["page"].replace("# ", "## ", 1)]
    return "\n".join(lines).rstrip() + "\n"


def _inference_columns(batches: list[int]) -> dict:
    columns = {"image tokens": lambda plan: str(plan["image_tokens"])}
    for b in batches:
        part = f"prefill {b}"
        columns[f"prefill ms, batch {b}"] = _cell(
            part, lambda r: f"{r['ms']:.4g} ± {r['spread_ms']:.2g}{_ratio(r)}"
        )
        columns[f"prompt tokens/s, batch {b}"] = _cell(part, lambda r: f"{r['per_second']:.4g}")
        columns |= _costs(part, f"prefill {{}}, batch {b}")
    for b in batches:
        part = f"decode {b}"
        columns[f"new tokens/s, batch {b}"] = _cell(
            part, lambda r: f"{r['per_second']:.4g}{_ratio(r)}"
        )
        columns |= _costs(part, f"decode {{}}, batch {b}")
    return columns


def _costs(part: str, name: str) -> dict:
    """The columns of a section's MFU and memory."""
    return {
        name.format("MFU"): _cell(part, lambda r: f"{100 * r['mfu']:.3g} %"),
        name.format("GiB"): _cell(part, lambda r: f"{r['peak_gib']:.2f}"),
    }


def _training_columns() -> dict:
    columns = {}
    for stage, trained in (("stage 1", "fusion"), ("stage 2", "fusion, language")):
        columns[f"{stage} ({trained}) ms"] = _cell(
            stage, lambda r: f"{r['ms']:.4g} ± {r['spread_ms']:.2g}{_ratio(r)}"
        )
        columns[f"{stage} tokens/s"] = _cell(stage, lambda r: f"{r['per_second']:.4g}")
        columns |= _costs(stage, f"{stage} {{}}")
    return columns


def _cell(part: str, show):
    return lambda plan: (
        show(plan[part]) if part in plan else plan["missing"].get(part, "not measured")
    )


def _ratio(row: dict) -> str:
    return f" (x {row['ratio']:.3f})" if "ratio" in row else ""


def _table(plans: dict, columns: dict) -> list[str]:
    rows = [["plan", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(show(plan) for show in columns.values())] for name, plan in plans.items()]
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
