"""What benchmarks/vllm.py measured, as a Markdown page; it can be written again from the JSON.

python benchmarks/vllm_table.py runs/vllm/speed.json
"""

import json
import sys
from pathlib import Path

STOCK, OURS = "stock", "local:"
KINDS = {"new": "new images", "seen": "images seen before"}


def make_page(result: dict) -> str:
    """The page: what was run, a table of throughput, one of first tokens, and one of FLOPs."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    settings = result["settings"]
    num_rounds = [len(parts["first new"]["rounds"]) for parts in result["servers"].values()]
    lines = [
        f"# Inside vLLM, on {result['machine']}, {result['date']}",
        "",
        f"{result['size']}; {versions}. Random weights; one image, {result['num_text_tokens']}"
        f" words and {settings['new_tokens']} new tokens. Medians of {min(num_rounds)} to"
        f" {max(num_rounds)} rounds in turns; x is the ratio to the stock LLaVA in the same round,"
        f" with least and most in brackets. It took {result['seconds']:.0f} s.",
        "",
        *make_throughput_table(result),
        "",
        *make_first_token_table(result),
        "",
        *make_cost_table(result),
        "",
        *compare_with_local(result),
    ]
    return "\n".join(lines).rstrip() + "\n"


def make_throughput_table(result: dict) -> list[str]:
    """Requests a second, and new tokens a second."""
    new_tokens = result["settings"]["new_tokens"]
    rows = [["server", "images", "clients", "requests/s", "new tokens/s", "x"]]
    for kind, words in KINDS.items():
        for clients in result["settings"]["clients"]:
            for name, parts in result["servers"].items():
                part = parts[f"{kind} {clients}"]
                rate = f"{part['median']:.2f} ({part['least']:.2f} to {part['most']:.2f})"
                tokens = f"{new_tokens * part['median']:.0f}"
                rows.append([show(name), words, str(clients), rate, tokens, show_ratio(name, part)])
    return make_table(rows)


def make_first_token_table(result: dict) -> list[str]:
    """Milliseconds to the first token, with one client."""
    rows = [["server", "first token, new image, ms", "x", "the same image again, ms", "x"]]
    for name, parts in result["servers"].items():
        row = [show(name)]
        for part in (parts["first new"], parts["first again"]):
            least, middle, most = (1000 * part[key] for key in ("least", "median", "most"))
            row += [f"{middle:.0f} ({least:.0f} to {most:.0f})", show_ratio(name, part)]
        rows.append(row)
    return make_table(rows)


def make_cost_table(result: dict) -> list[str]:
    """FLOPs of a request, and the throughput that they alone would give."""
    base = result["costs"]["llava"]
    rows = [["plan", "GFLOP a request", "of them encoder and shortcuts", "throughput by FLOPs, x"]]
    for plan, cost in result["costs"].items():
        vision = cost["request"] - cost["language"]
        rows.append(
            [
                plan,
                f"{cost['request'] / 1e9:.2f}",
                f"{vision / 1e9:.2f}",
                f"{base['request'] / cost['request']:.3f}",
            ]
        )
    return make_table(rows)


def compare_with_local(result: dict) -> list[str]:
    """Sentences on vLLM over our own server."""
    lines = []
    for name, parts in result["servers"].items():
        plan = name.removeprefix(OURS)
        inside = result["servers"].get(plan)
        if plan == name or inside is None:
            continue
        ratios = []
        for kind, words in KINDS.items():
            for clients in result["settings"]["clients"]:
                key = f"{kind} {clients}"
                ratio = inside[key]["ratio"] / parts[key]["ratio"]
                ratios.append(f"{ratio:.2f} ({words}, {clients} clients)")
        lines.append(f"- {plan}: vLLM over our own server: {', '.join(ratios)}.")
    return lines


def show(name: str) -> str:
    """A server's name in words."""
    if name == STOCK:
        return "stock LLaVA, vLLM"
    if name.startswith(OURS):
        return f"`{name.removeprefix(OURS)}`, our own server"
    return f"`{name}`, vLLM"


def show_ratio(name: str, part: dict) -> str:
    """A ratio with its least and most."""
    if name == STOCK:
        return "1"
    return f"{part['ratio']:.3f} ({part['ratio_least']:.3f} to {part['ratio_most']:.3f})"


def make_table(rows: list[list[str]]) -> list[str]:
    """Rows as lines of Markdown; the first has the headings."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    print(make_page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
