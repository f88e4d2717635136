"""Chat models behind APIs: whether every prompt is answered or reported, none paid for twice, and how fast.

Without --base-url it asks a server of its own, in a process beside it, that speaks Anthropic's protocol: first one that
works, for the speed against what the server can do, then one of whose replies a fifth are faults (429, 500, cut
connections, stalls, malformed, refused and empty answers). With --base-url it asks a server of OpenAI's protocol, for
instance one that llama-cpp-python starts:

    python -m llama_cpp.server --model SmolLM2-135M-Instruct.Q4_1.gguf
    python experiments/benchmark_chat.py --base-url http://localhost:8000/v1 --plain-threads 1

What a server can do is measured by a plain client: threads that each send one request after the other.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from benchmarks.measure import markdown

from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import open_chat_model
from nla_jax.process import machine_class

SERVER = Path(__file__).parent.parent / "tests/chat_server.py"
TOPICS = ("rain", "bread", "a bridge", "chess", "salt", "an owl", "trains", "glass", "the moon", "a letter")


def prompts(count: int, name: str) -> list[str]:
    """Different short prompts."""
    return [f"Name one word about {TOPICS[i % len(TOPICS)]}. ({name} {i})" for i in range(count)]


@contextlib.contextmanager
def server(faults: float, slots: int, seconds: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    options = {"--faults": faults, "--slots": slots, "--seconds": seconds, "--stall": 4.0}
    arguments = [str(part) for option in options.items() for part in option]
    command = [sys.executable, str(SERVER), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def plain_rate(url: str, model: str, asked: Sequence[str], max_tokens: int, threads: int) -> float:
    """Requests a second of threads that each send one request after the other."""

    def ask(prompt: str) -> None:
        body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
        headers = {"content-type": "application/json", "authorization": "Bearer key"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as reply:
            reply.read()

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(ask, asked))
    return len(asked) / (time.perf_counter() - start)


def ask(config: ChatConfig, asked: Sequence[str], max_tokens: int, cache: Path) -> dict[str, float]:
    """Ask all prompts twice, the second time with everything on record; importing the SDK is not counted."""
    seconds = []
    for _ in range(2):
        chat, start = open_chat_model(config, cache), time.perf_counter()
        answers = chat.answers(asked, max_tokens=max_tokens)
        seconds.append(time.perf_counter() - start)
    answered = sum(bool(answer.text) for answer in answers)
    reported = sum(bool(answer.problem) for answer in answers)
    assert answered + reported == len(asked), "a prompt was lost"
    return {
        "prompts": len(asked),
        "answered": answered,
        "reported": reported,
        "seconds": seconds[0],
        "requests/s": len(asked) / seconds[0],
        "seconds, second run": seconds[1],
    }


def of_stub(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Rows of the server of our own, without and with faults."""
    os.environ.setdefault("ANTHROPIC_API_KEY", "key")
    for faults in (0.0, 0.2):
        with server(faults, args.slots, args.seconds) as url:
            os.environ["ANTHROPIC_BASE_URL"] = url
            config = ChatConfig("anthropic:stub", timeout=2.0)
            row = ask(
                config, prompts(args.requests, f"{faults}"), args.max_tokens, folder / f"{faults}.sqlite"
            )
            stats = json.loads(urllib.request.urlopen(f"{url}/stats").read())
            row["answered twice"] = sum(count > 1 for count in stats["answered"].values())
            row["faults"] = sum(stats["faults"].values())
            if not faults:
                asked = prompts(args.requests, "plain")
                row["plain client, requests/s"] = plain_rate(
                    f"{url}/v1/messages", "stub", asked, 1, args.slots
                )
            yield {"server": f"of our own, {faults:.0%} faults", **row}


def of_base_url(args: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """The row of a server of OpenAI's protocol."""
    os.environ.setdefault("OPENAI_API_KEY", "key")
    os.environ["OPENAI_BASE_URL"] = args.base_url
    config = ChatConfig(f"openai:{args.model}", thinking_tokens=0)
    row = ask(config, prompts(args.requests, "ours"), args.max_tokens, folder / "chat.sqlite")
    url, asked = f"{args.base_url}/chat/completions", prompts(max(args.requests // 4, 1), "plain")
    row["plain client, requests/s"] = plain_rate(url, args.model, asked, args.max_tokens, args.plain_threads)
    yield {"server": args.base_url, **row}


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=8, help="most tokens of an answer")
    parser.add_argument("--slots", type=int, default=64, help="requests that our server takes at a time")
    parser.add_argument("--seconds", type=float, default=0.2, help="time that our server takes for each")
    parser.add_argument("--base-url", help="address of a server of OpenAI's protocol, with /v1 at its end")
    parser.add_argument("--model", default="default", help="name of its model")
    parser.add_argument(
        "--plain-threads", type=int, default=4, help="threads of the plain client that asks it"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure = of_base_url if args.base_url else of_stub
        rows = list(measure(args, Path(folder)))
    print(machine_class())
    names = list(dict.fromkeys(name for row in rows for name in row if name != "server"))
    cells = [[name, *(f"{row[name]:,.4g}" if name in row else "" for row in rows)] for name in names]
    print(markdown(["", *(row["server"] for row in rows)], cells))


if __name__ == "__main__":
    main()
