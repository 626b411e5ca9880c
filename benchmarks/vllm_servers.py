"""Servers that benchmarks/vllm.py starts, each of them a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from vllm_models import STOCK, Size

OURS = "local"  # prefix of a model that our own server serves
ANSWER_SECONDS = 900  # a server that does not answer by then has failed


@dataclass(frozen=True)
class Launch:
    """How servers are started.

    Attributes:
        folder: Holds the models and the logs.
        size: How large the models are.
        device: "cpu" or "cuda".
        threads: Threads of the model on a CPU.
        memory: Part of the memory that vLLM takes for one server.
        max_batch: The most answers that are written at once.
        options: Further options of vLLM.
    """

    folder: Path
    size: Size
    device: str
    threads: int
    memory: float
    max_batch: int
    options: tuple[str, ...] = ()


@dataclass
class Server:
    """A server of one model.

    Attributes:
        name: `stock`, the name of a plan, or `local:` and that of a plan.
        launch: How it is started.
        port: Where it listens.
        process: The process while it runs.
    """

    name: str
    launch: Launch
    port: int = field(default_factory=lambda: find_free_port())
    process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """The address of its OpenAI interface."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> Path:
        """What it says."""
        return self.launch.folder / f"{self.name.replace(':', '-')}.log"

    @property
    def model(self) -> str:
        """Its model's name in requests, and in the folder of models."""
        return self.name.removeprefix(f"{OURS}:")

    @property
    def is_ours(self) -> bool:
        """Whether it is our own server."""
        return self.name.startswith(f"{OURS}:")

    def start(self) -> None:
        """Start it; `wait` returns when it answers."""
        command = build_local_command(self) if self.is_ours else build_vllm_command(self)
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                env=make_environment(self.launch),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers.

        Raises:
            RuntimeError: It ended, or does not answer in time.
        """
        end = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/models", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise RuntimeError(f"the server {self.name} does not answer; its log ends so:\n{tail}")

    def stop(self) -> None:
        """End it and all its processes."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process = None


def build_vllm_command(server: Server) -> list[str]:
    """vLLM's server; a stock LLaVA and our models get the same options."""
    launch = server.launch
    folder = launch.folder / server.model
    options = {
        "model": folder,
        "served-model-name": server.model,
        "host": "127.0.0.1",
        "port": server.port,
        "dtype": launch.size.dtype,
        "max-model-len": launch.size.max_length,
        "max-num-seqs": launch.max_batch,
        "gpu-memory-utilization": launch.memory,
        "limit-mm-per-prompt": '{"image": 1}',
        "generation-config": "vllm",
    }
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if launch.device == "cpu":
        command.append("--enforce-eager")
    return [*command, *launch.options]


def build_local_command(server: Server) -> list[str]:
    """Our own server of the same model."""
    launch = server.launch
    command = [sys.executable, "-m", "sparsecut", "serve", str(launch.folder / server.model)]
    command += ["--port", str(server.port), "--name", server.model, "--device", launch.device]
    command += ["--max-batch", str(launch.max_batch), "--queue", str(2 * launch.max_batch)]
    if launch.device == "cpu":
        command += ["--threads", str(launch.threads)]
    return command


def make_environment(launch: Launch) -> dict[str, str]:
    """The environment of a server."""
    settings = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if launch.device == "cpu":
        cores = "0" if launch.threads == 1 else f"0-{launch.threads - 1}"
        settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
        settings["OMP_NUM_THREADS"] = str(launch.threads)
    return {**os.environ, **settings}


def find_free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_names(plans: list[str], local: list[str]) -> list[str]:
    """The servers of a run, the stock LLaVA first."""
    return [STOCK, *plans, *(f"{OURS}:{plan}" for plan in local)]
