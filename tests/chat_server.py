"""A server of our own that speaks Anthropic's and OpenAI's protocols, with faults if wanted.

As a program it serves on a free port, which it prints, until its input ends:

    python tests/chat_server.py --faults 0.2 --slots 64 --seconds 0.1
"""

import argparse
import collections
import dataclasses
import datetime
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "cut", "stall", "malformed", "refused", "empty")
AT_ONCE = {"retry-after-ms": "1"}
"""Tells a client to try again without waiting."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A reply that is none: one of FAULTS."""

    kind: str


Answer = str | Fault | tuple[int, object]
"""A text, a fault, or a status with a body."""


def random_faults(share: float, reply: Callable[[str], Answer], seed: int = 0) -> Callable[[str], Answer]:
    """Replies of which a share are faults, decided by the prompt and how often it came."""
    tries: collections.Counter = collections.Counter()

    def faulty(prompt: str) -> Answer:
        tries[prompt] += 1
        draw = random.Random(f"{seed} {prompt} {tries[prompt]}")
        return Fault(draw.choice(FAULTS)) if draw.random() < share else reply(prompt)

    return faulty


class ChatServer:
    """`reply` takes a prompt and gives its answer; `asked` has the prompts and `requests` the bodies, as they came."""

    def __init__(
        self,
        reply: Callable[[str], Answer] = lambda prompt: f"<{prompt}>",
        *,
        slots=0,
        seconds=0.0,
        stall=30.0,
    ):
        self.reply, self.slots, self.seconds, self.stall = reply, slots, seconds, stall
        self.asked, self.requests, self.answered = [], [], collections.Counter()
        self.faults: collections.Counter = collections.Counter()
        self.batches, self.polls = {}, 1
        self.ends = lambda prompt: "succeeded"
        """How a prompt of a batch ends: a type of result, or an error type for one that is errored."""
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        self.http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def decide(self, prompt: str) -> Answer:
        """The answer to a prompt, after the time that it takes; 429 where all slots are taken."""
        with self.lock:
            if self.slots and self.busy >= self.slots:
                return Fault("429")
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
        try:
            time.sleep(self.seconds)
            return self.reply(prompt)
        finally:
            with self.lock:
                self.busy -= 1

    def results(self, name: str) -> list[dict]:
        """The lines of a batch's results, last first."""
        lines = []
        for request in reversed(self.batches[name]["requests"]):
            prompt = request["params"]["messages"][0]["content"]
            kind = self.ends(prompt)
            result = {"type": kind}
            if kind == "succeeded":
                self.answered[prompt] += 1
                result["message"] = anthropic_message(self.reply(prompt))
            elif kind not in ("canceled", "expired"):
                error = {"type": kind, "message": f"{kind} of {prompt}"}
                result = {"type": "errored", "error": {"type": "error", "error": error, "request_id": "r"}}
            lines.append({"custom_id": request["custom_id"], "result": result})
        return lines

    def described(self, name: str) -> dict:
        """A batch as the protocol describes it."""
        batch = self.batches[name]
        ended, count = batch["polls"] >= self.polls, len(batch["requests"])
        counts = {"processing": 0 if ended else count, "succeeded": count if ended else 0}
        return {
            "id": name,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress",
            "request_counts": {**counts, "errored": 0, "canceled": 0, "expired": 0},
            "created_at": batch["created_at"],
            "expires_at": batch["created_at"],
            "results_url": f"{self.url}/v1/messages/batches/{name}/results" if ended else None,
        }


class _Http(ThreadingHTTPServer):
    request_queue_size = 1024


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    chat: ChatServer

    def do_GET(self):
        chat, (*_, last) = self.chat, self.path.partition("?")[0].split("/")
        if last == "stats":
            self.send(200, {"faults": chat.faults, "most": chat.most_busy, "answered": chat.answered})
        elif last == "results":
            lines = chat.results(self.path.split("/")[-2])
            self.send(200, "\n".join(map(json.dumps, lines)), kind="application/x-jsonl")
        elif last == "batches":
            listed = [chat.described(name) for name in reversed(chat.batches)]
            self.send(200, {"data": listed, "has_more": False, "first_id": None, "last_id": None})
        else:
            chat.batches[last]["polls"] += 1
            self.send(200, chat.described(last))

    def do_POST(self):
        chat, body = self.chat, json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/messages/batches":
            name, now = f"batch_{len(chat.batches)}", datetime.datetime.now(datetime.UTC)
            chat.batches[name] = {"requests": body["requests"], "polls": 0, "created_at": now.isoformat()}
            return self.send(200, chat.described(name))
        prompt = body["messages"][-1]["content"]
        if self.path == "/v1/messages/count_tokens":
            return self.send(200, {"input_tokens": len(prompt.split())})
        chat.asked.append(prompt)
        chat.requests.append(body)
        answer = chat.decide(prompt)
        if isinstance(answer, Fault):
            return self.fail(answer.kind, prompt)
        if isinstance(answer, tuple):
            return self.send(*answer)
        self.answer(prompt, answer)

    def answer(self, prompt: str, text: str, refused: bool = False):
        self.chat.answered[prompt] += 1
        wrap = anthropic_message if self.path == "/v1/messages" else openai_completion
        self.send(200, wrap(text, refused=refused))

    def fail(self, kind: str, prompt: str):
        self.chat.faults[kind] += 1
        if kind in ("429", "500"):
            self.send(int(kind), {"type": "error", "error": {"type": "api_error", "message": "fault"}})
        elif kind in ("refused", "empty"):
            self.answer(prompt, "", refused=kind == "refused")
        elif kind == "malformed":
            self.send(200, '{"id": "m", "content": [{"type": "te')
        else:
            time.sleep(self.chat.stall if kind == "stall" else 0)
            self.close_connection = True

    def send(self, status: int, body: object, kind: str = "application/json"):
        sent = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {**AT_ONCE, "content-type": kind, "content-length": str(len(sent))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        pass


def anthropic_message(text: str, refused: bool = False) -> dict:
    """An answer as Anthropic's protocol wraps it; tokens are words."""
    return {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": text},
        ],
        "stop_reason": "refusal" if refused else "end_turn",
        "usage": {"input_tokens": 100, "output_tokens": 10},
    }


def openai_completion(text: str, refused: bool = False) -> dict:
    """An answer as OpenAI's protocol wraps it."""
    message = {"role": "assistant", "content": text, "refusal": "no" if refused else None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=float, default=0.0, help="share of replies that are faults")
    parser.add_argument("--slots", type=int, default=64, help="requests at a time; others get 429")
    parser.add_argument("--seconds", type=float, default=0.1, help="time that an answer takes")
    parser.add_argument("--stall", type=float, default=30.0, help="time after which a stalled reply is cut")
    args = parser.parse_args()
    reply = random_faults(args.faults, lambda prompt: f"An answer to: {prompt}")
    server = ChatServer(reply, slots=args.slots, seconds=args.seconds, stall=args.stall)
    print(server.url, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
