"""Many clients at once against `sparsecut serve`: errors, wrong answers, memory and throughput.

    python benchmarks/serve_load.py runs/demo/runs/main/sparsecut/0/final \\
        runs/demo/data/test.json --clients 32

Every answer is compared with what the model's own `generate` answers to that question alone. The
server is a process of its own, whose memory is read from /proc every second. With --hostile, other
clients meanwhile send what should be refused, slowly or without end. Exits with 1 for an error or a
wrong answer.
"""

import argparse
import asyncio
import base64
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import openai
import torch

import sparsecut
from sparsecut.data.examples import IMAGE, Example, read_examples
from sparsecut.prompts import decode_answers, make_greedy_config, prepare_inputs, render_prompt

STREAMED_FRACTION = 0.5  # of all requests
LEFT_FRACTION = 0.1  # of all requests; these are streams


@dataclass
class Question:
    """A question as a request has it, and the model's own answer."""

    messages: list[dict]
    answer: str


@dataclass
class Results:
    """What all clients saw.

    Attributes:
        num_answers: Whole answers.
        num_left: Streams that were left in their middle.
        errors: Errors of the client, as text.
        wrong: Of each wrong answer the question, the model's own answer and the server's.
        seconds: Time of each whole answer.
        memory_mib: Memory of the server, every second.
        hostile: Statuses that hostile requests got, by kind of request.
        metrics: The lines of /metrics at the end.
    """

    num_answers: int = 0
    num_left: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[tuple[str, str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    hostile: Counter = field(default_factory=Counter)
    metrics: list[str] = field(default_factory=list)


def main() -> None:
    """Answer alone, start the server, ask it from all sides, and print the results."""
    arguments = parse_arguments()
    examples = read_examples(arguments.data)
    num_questions = min(arguments.questions, len(examples))
    examples = random.Random(0).sample(examples, num_questions)
    start = time.perf_counter()
    questions = answer_alone(arguments.model, examples, arguments.length)
    rate = num_questions / (time.perf_counter() - start)
    print(f"{num_questions} questions alone: {rate:.1f} answers/s")
    command = build_server_command(arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+/v1", server.stdout.readline())[0]
            results = asyncio.run(run_clients(url, questions, server.pid, arguments))
        finally:
            server.terminate()
    print_results(results, arguments)
    sys.exit(bool(results.errors or results.wrong))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("data", help="data file in LLaVA's format, with images")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--questions", type=int, default=400, help="drawn from the data")
    parser.add_argument("--length", type=int, default=16, help="tokens of an answer at most")
    parser.add_argument(
        "--hostile", type=int, default=0, help="clients that send what should be refused"
    )
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument(
        "--keep-mib", type=int, default=256, help="of vision features; 0 encodes every time"
    )
    return parser.parse_args()


def build_server_command(arguments: argparse.Namespace) -> list[str]:
    """The server on a free port, with one thread for the model."""
    command = [sys.executable, "-m", "sparsecut", "serve", arguments.model]
    command += ["--port", "0", "--threads", "1"]
    command += ["--keep-mib", str(arguments.keep_mib)]
    command += ["--max-batch", str(arguments.max_batch)]
    command += ["--queue", str(2 * arguments.clients)]
    return command


@torch.inference_mode()
def answer_alone(path: str, examples: list[Example], length: int) -> list[Question]:
    """Answer every example by the model itself, one at a time."""
    torch.set_num_threads(1)
    model, processor = sparsecut.load(path)
    config = make_greedy_config(model, length)
    questions = []
    for example in examples:
        text = example.messages[0]["content"]
        content = text.replace(IMAGE, processor.image_token)
        prompt = render_prompt(processor, [{"role": "user", "content": content}])
        inputs = prepare_inputs(model, processor, [prompt], [example.load_images()])
        output = model.generate(**inputs, generation_config=config)
        answer = decode_answers(processor, inputs, output)[0]
        questions.append(Question(build_messages(example), answer))
    return questions


def build_messages(example: Example) -> list[dict]:
    """An example's first question as a request has it, images first."""
    parts = []
    for name in example.images:
        data = (Path(example.store.path) / name).read_bytes()
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    text = example.messages[0]["content"].replace(IMAGE, "").strip()
    parts.append({"type": "text", "text": text})
    return [{"role": "user", "content": parts}]


async def run_clients(
    url: str, questions: list[Question], pid: int, arguments: argparse.Namespace
) -> Results:
    """Ask from all clients for the given time."""
    results = Results()
    deadline = time.monotonic() + arguments.seconds
    models_url = urlsplit(url)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        models = await client.models.list()
        settings = {
            "model": models.data[0].id,
            "temperature": 0,
            "max_tokens": arguments.length,
        }
        tasks = [
            run_client(client, random.Random(number), questions, settings, deadline, results)
            for number in range(arguments.clients)
        ]
        address = (models_url.hostname, models_url.port)
        tasks += [
            run_hostile_client(address, random.Random(number), questions, deadline, results)
            for number in range(arguments.hostile)
        ]
        await asyncio.gather(watch_memory(pid, deadline, results), *tasks)
        metrics = await client.get("../metrics", cast_to=str)
    results.metrics = [line for line in metrics.splitlines() if not line.startswith("#")]
    return results


async def run_client(
    client: openai.AsyncOpenAI,
    generator: random.Random,
    questions: list[Question],
    settings: dict,
    deadline: float,
    results: Results,
) -> None:
    """Ask one question after the other until the deadline."""
    while time.monotonic() < deadline:
        question = generator.choice(questions)
        start = time.monotonic()
        try:
            answer = await ask(client, question.messages, generator.random(), settings)
        except openai.OpenAIError as error:
            results.errors.append(repr(error))
            continue
        if answer is None:
            results.num_left += 1
            continue
        results.num_answers += 1
        results.seconds.append(time.monotonic() - start)
        if answer != question.answer:
            text = question.messages[0]["content"][-1]["text"]
            results.wrong.append((text, question.answer, answer))


async def ask(
    client: openai.AsyncOpenAI, messages: list[dict], draw: float, settings: dict
) -> str | None:
    """One answer; None where the stream was left.

    Args:
        client: The client.
        messages: The question.
        draw: A random number from 0 to 1 that decides whether to stream and whether to leave.
        settings: Settings of the request.
    """
    create = client.chat.completions.create
    if draw >= STREAMED_FRACTION:
        response = await create(messages=messages, **settings)
        return response.choices[0].message.content
    text = ""
    async with await create(messages=messages, stream=True, **settings) as stream:
        async for event in stream:
            text += event.choices[0].delta.content or ""
            if draw < LEFT_FRACTION:
                return None
    return text


def make_hostile_request(kind: str, question: Question) -> tuple[str, bytes]:
    """Headers and body of a request that should be refused, or whose settings are extreme."""
    body = {"messages": question.messages, "max_tokens": 4}
    headers = "Host: localhost\r\nContent-Type: application/json\r\n"
    if kind == "tiny":
        body |= {"temperature": 1e-40, "top_p": 1e-300}
    elif kind == "token":
        body["messages"] = [{"role": "user", "content": "what is <image> this"}]
    elif kind == "long":
        body["messages"] = [{"role": "user", "content": "red square " * 80_000}]
    elif kind == "nested":
        return headers, b"[" * 1_000_000
    elif kind == "image":
        url = "data:image/png;base64," + base64.b64encode(b"\x89PNG" * 9).decode()
        part = {"type": "image_url", "image_url": {"url": url}}
        body["messages"] = [{"role": "user", "content": [part]}]
    elif kind == "host":
        headers = headers.replace("localhost", "evil.example")
    elif kind == "origin":
        headers += "Origin: https://evil.example\r\n"
    elif kind == "type":
        headers = headers.replace("application", "text/plain;application")
    return headers, json.dumps(body).encode()


HOSTILE_KINDS = ("tiny", "token", "long", "nested", "image", "host", "origin", "type")
SILENT_KINDS = ("slow body", "slow head", "endless", "nothing")


async def run_hostile_client(
    address: tuple[str, int],
    generator: random.Random,
    questions: list[Question],
    deadline: float,
    results: Results,
) -> None:
    """Send one hostile request after the other until the deadline; a third never ends."""
    while time.monotonic() < deadline:
        is_silent = generator.random() < 0.33
        kind = generator.choice(SILENT_KINDS if is_silent else HOSTILE_KINDS)
        send = keep_silent if is_silent else send_hostile
        try:
            seconds = min(60.0, deadline - time.monotonic() + 1)
            async with asyncio.timeout(seconds):
                status = await send(address, kind, generator.choice(questions))
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
        results.hostile[f"{kind}: {status}"] += 1


async def send_hostile(address: tuple[str, int], kind: str, question: Question) -> str:
    """The status that a hostile request gets."""
    headers, body = make_hostile_request(kind, question)
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return (await reader.readline()).decode()[9:12] or "closed"
    finally:
        writer.close()


async def keep_silent(address: tuple[str, int], kind: str, question: Question) -> str:
    """Send a part of a request, or an endless one, until the server ends it."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a.localhost\r\n"
    head += b"Content-Type: application/json\r\n"
    starts = {
        "slow body": head + b"Content-Length: 1000000\r\n\r\n",
        "slow head": head,
        "endless": head + b"Transfer-Encoding: chunked\r\n\r\n",
        "nothing": b"",
    }
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(starts[kind])
        answer = asyncio.ensure_future(reader.readline())
        while not answer.done():
            await asyncio.wait([answer], timeout=0.5)
            if kind == "endless":
                writer.write(b"2710\r\n" + b" " * 10_000 + b"\r\n")
            elif kind == "slow body":
                writer.write(b" ")
            await writer.drain()
        return answer.result().decode()[9:12] or "closed"
    finally:
        writer.close()


async def watch_memory(pid: int, deadline: float, results: Results) -> None:
    """Write down the server's memory every second."""
    while time.monotonic() < deadline:
        results.memory_mib.append(read_memory_mib(pid))
        await asyncio.sleep(1)
    results.memory_mib.append(read_memory_mib(pid))


def read_memory_mib(pid: int) -> float:
    """Memory that a process holds, in MiB; 0 where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def print_results(results: Results, arguments: argparse.Namespace) -> None:
    """Print what came of it."""
    print(
        f"{arguments.clients} clients for {arguments.seconds:.0f} s:"
        f" {results.num_answers} answers, {results.num_left} left in their middle"
    )
    print(f"errors {len(results.errors)}, wrong answers {len(results.wrong)}")
    for problem in [*results.errors[:3], *results.wrong[:3]]:
        print("   ", problem)
    if results.seconds:
        seconds = sorted(results.seconds)
        last = len(seconds) - 1
        median = seconds[int(0.5 * last)]
        percentile = seconds[int(0.95 * last)]
        rate = len(seconds) / arguments.seconds
        print(f"{rate:.1f} answers/s, median {median:.2f} s, 95th percentile {percentile:.2f} s")
    memory = results.memory_mib
    after_a_third = memory[len(memory) // 3]
    print(
        f"memory MiB: {memory[0]:.0f} at first, {after_a_third:.0f} after a third,"
        f" {max(memory):.0f} at most, {memory[-1]:.0f} at the end"
    )
    for name, number in sorted(results.hostile.items()):
        print(f"hostile {name}: {number}")
    print("\n".join(results.metrics))


if __name__ == "__main__":
    main()
