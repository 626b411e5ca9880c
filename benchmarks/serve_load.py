"""Many clients at once against `sparsecut serve`: errors, wrong answers, memory and throughput.

    python benchmarks/serve_load.py runs/demo/sparsecut/final runs/demo/data/test.json --clients 32
    --seconds 60

Every answer is compared with what the model's own `generate` says to that question alone. The server is a process of its own, whose
memory is read from /proc every second (elsewhere it is not told).
"""

import argparse
import asyncio
import base64
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import openai
import torch

import sparsecut
from sparsecut.data.examples import IMAGE, read_examples
from sparsecut.prompts import decode_answers, make_greedy_config, prepare_inputs, render_prompt


def main() -> None:
    """Answer alone, start the server, ask from all sides, print what came of it; exit 1 for an
    error or a wrong answer.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("records", help="LLaVA-format records with pictures")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--questions", type=int, default=400, help="different ones, drawn from the records"
    )
    parser.add_argument("--length", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument(
        "--keep-mib", type=int, default=256, help="of pictures' features; 0 encodes every time"
    )
    chosen = parser.parse_args()
    examples = read_examples(chosen.records)
    examples = random.Random(0).sample(examples, min(chosen.questions, len(examples)))
    began = time.perf_counter()
    questions = answered_alone(chosen.model, examples, chosen.length)
    print(
        f"{len(questions)} questions alone: {len(questions) / (time.perf_counter() - began):.1f}"
        " answers/s"
    )
    command = [
        sys.executable,
        "-m",
        "sparsecut",
        "serve",
        chosen.model,
        "--port",
        "0",
        "--threads",
        "1",
    ]
    command += [
        "--keep-mib",
        str(chosen.keep_mib),
        "--max-batch",
        str(chosen.max_batch),
        "--queue",
        str(2 * chosen.clients),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            found = asyncio.run(ask_all(url, questions, server.pid, chosen))
        finally:
            server.terminate()
    told(found, chosen)
    sys.exit(bool(found["errors"] or found["wrong"]))


@torch.inference_mode()
def answered_alone(path: str, examples, length: int) -> list[tuple[list[dict], str]]:
    """(messages of a request, answer) of each example, by the model itself, one at a time."""
    torch.set_num_threads(1)
    model, processor = sparsecut.load(path)
    questions = []
    for example in examples:
        text = example.messages[0]["content"]
        prompt = render_prompt(
            processor, [{"role": "user", "content": text.replace(IMAGE, processor.image_token)}]
        )
        inputs = prepare_inputs(model, processor, [prompt], [example.pictures()])
        ids = model.generate(**inputs, generation_config=make_greedy_config(model, length))
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(example, name)}}
            for name in example.images
        ]
        parts.append({"type": "text", "text": text.replace(IMAGE, "").strip()})
        questions.append(
            ([{"role": "user", "content": parts}], decode_answers(processor, inputs, ids)[0])
        )
    return questions


def data_url(example, name: str) -> str:
    """A picture's file as it is."""
    data = (Path(example.store.path) / name).read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


async def ask_all(url: str, questions, pid: int, chosen) -> dict:
    """What all clients saw in the time given: every other request streams, every tenth is left in
    its middle.
    """
    found = {"answers": 0, "wrong": [], "errors": [], "left": 0, "seconds": [], "memory": []}
    until = time.monotonic() + chosen.seconds
    settings = {"model": openai.omit, "temperature": 0, "max_tokens": chosen.length}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        name = (await client.models.list()).data[0].id
        settings["model"] = name

        async def one_client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until:
                messages, wanted = chance.choice(questions)
                began = time.monotonic()
                try:
                    answer = await ask(client, messages, chance.random(), settings)
                except openai.OpenAIError as error:
                    found["errors"].append(repr(error))
                    continue
                if answer is None:
                    found["left"] += 1
                    continue
                found["answers"] += 1
                found["seconds"].append(time.monotonic() - began)
                if answer != wanted:
                    found["wrong"].append((messages[0]["content"][-1]["text"], wanted, answer))

        async def watch() -> None:
            while time.monotonic() < until:
                found["memory"].append(resident_mib(pid))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *map(one_client, range(chosen.clients)))
        found["memory"].append(resident_mib(pid))
        metrics = await client.get("../metrics", cast_to=str)
    found["metrics"] = [line for line in metrics.splitlines() if not line.startswith("#")]
    return found


async def ask(client, messages, chance: float, settings: dict) -> str | None:
    """An answer, streamed or not by chance; None where the stream was left."""
    if chance < 0.5:
        return (
            (await client.chat.completions.create(messages=messages, **settings))
            .choices[0]
            .message.content
        )
    text = ""
    async with await client.chat.completions.create(
        messages=messages, stream=True, **settings
    ) as stream:
        async for event in stream:
            text += event.choices[0].delta.content or ""
            if chance > 0.9:
                return None
    return text


def resident_mib(pid: int) -> float:
    """Memory that a process holds, in MiB; 0 where /proc does not tell."""
    try:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
    except OSError:
        return 0.0


def told(found: dict, chosen) -> None:
    """Print it."""
    seconds, memory = sorted(found["seconds"]), found["memory"]
    middle = memory[len(memory) // 3 :]
    print(
        f"{chosen.clients} clients for {chosen.seconds:.0f} s: {found['answers']} answers,"
        f" {found['left']} left in their middle"
    )
    print(f"errors {len(found['errors'])}, wrong answers {len(found['wrong'])}")
    for example in [*found["errors"][:3], *found["wrong"][:3]]:
        print("   ", example)
    if seconds:
        at = [seconds[int(share * (len(seconds) - 1))] for share in (0.5, 0.95)]
        print(
            f"{len(seconds) / chosen.seconds:.1f} answers/s, {at[0]:.2f} s in the middle,"
            f" {at[1]:.2f} s at the 95th percentile"
        )
    print(
        f"memory MiB: {memory[0]:.0f} at first, {middle[0]:.0f} after a third, {max(memory):.0f} at"
        f" most, {memory[-1]:.0f} at the end"
    )
    print("\n".join(found["metrics"]))


if __name__ == "__main__":
    main()
