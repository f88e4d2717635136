"""The real SDKs against a server of our own."""

import json
import shutil
import sqlite3
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_model import write_tiny_model

from nla_jax.chat.models import CachedChat, open_chat_model
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.files import as_path

PROVIDERS = ("anthropic", "openai")
AT_ONCE = {"retry-after-ms": "1"}
"""Tells an SDK to try again without waiting."""


class Server:
    """Speaks both protocols: `reply` takes a prompt and gives its answer, or (status, body)."""

    def __init__(self):
        self.asked, self.requests, self.reply = [], [], lambda prompt: f"<{prompt}>"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][0]["content"]
                outer.asked.append(prompt)
                outer.requests.append(body)
                answer = outer.reply(prompt)
                status, answer = answer if isinstance(answer, tuple) else (200, whole(self.path, answer))
                sent = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**AT_ONCE, "content-type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"


def whole(path: str, answer: str) -> dict:
    """An answer as the protocol of a path wraps it."""
    if path == "/v1/messages":
        return {
            "id": "m",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": answer},
            ],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 1, "output_tokens": 1},
        }
    assert path == "/v1/chat/completions", path
    message = {"role": "assistant", "content": answer}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


@pytest.fixture
def server(monkeypatch):
    found = Server()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", found.url)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{found.url}/v1")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_answers_come_in_order_and_are_paid_for_once(server, provider, tmp_path):
    second = threading.Event()

    def reply(prompt):
        # The first prompt is answered after the second.
        if prompt == "one":
            assert second.wait(30)
        if prompt == "two":
            second.set()
        return f"<{prompt}>"

    server.reply, cache = reply, tmp_path / "new" / "chat.sqlite"
    chat = open_chat_model(f"{provider}:m", cache)
    assert chat(["one", "two", "one"], max_tokens=5) == ["<one>", "<two>", "<one>"]
    assert sorted(server.asked) == ["one", "two"]
    limit = {"anthropic": "max_tokens", "openai": "max_completion_tokens"}[provider]
    assert {(body["model"], body[limit]) for body in server.requests} == {("m", 5 + 1024)}
    # As after a restart, with something new among them.
    again = open_chat_model(f"{provider}:m", cache)
    assert again(["two", "three"], max_tokens=5) == ["<two>", "<three>"]
    assert sorted(server.asked) == ["one", "three", "two"]
    # Another model, or another limit, is another question.
    assert open_chat_model(f"{provider}:n", cache)(["one"], max_tokens=5) == ["<one>"]
    assert again(["one"], max_tokens=6) == ["<one>"]
    assert server.asked.count("one") == 3
    with sqlite3.connect(cache) as db:
        assert db.execute("select count(*) from answers").fetchone() == (5,)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_busy_and_broken_servers_are_asked_again(server, provider, tmp_path):
    answers = iter([(429, {"error": {"message": "slow"}}), (500, {"error": {"message": "oops"}}), "done"])
    server.reply = lambda prompt: next(answers)
    assert open_chat_model(f"{provider}:m", tmp_path / "c")(["x"], max_tokens=5) == ["done"]
    assert server.asked == ["x"] * 3


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_was_answered_beside_a_failure_is_kept(server, provider, tmp_path):
    others, failed = threading.Semaphore(0), threading.Event()

    def reply(prompt):
        if prompt == "bad":
            assert others.acquire(timeout=30) and others.acquire(timeout=30)
            failed.set()
            return 400, {"error": {"message": "no such model"}}
        others.release()
        assert failed.wait(30)
        return f"<{prompt}>"

    server.reply = reply
    chat = open_chat_model(f"{provider}:m", tmp_path / "c")
    message = f"{provider}:m gave no answer.*no such model.*the same command goes on"
    with pytest.raises(RuntimeError, match=message):
        chat(["good", "fine", "bad"], max_tokens=5)
    server.asked.clear()
    server.reply = str.upper
    assert chat(["good", "fine", "bad"], max_tokens=5) == ["<good>", "<fine>", "BAD"]
    assert server.asked == ["bad"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("body", [{"detail": "hello"}, "hello", {"choices": [], "content": 3}])
def test_a_reply_of_another_protocol_is_named(server, provider, body, tmp_path):
    server.reply = lambda prompt: (200, body)
    with pytest.raises(
        RuntimeError, match=f"{provider}:m sent a reply that is not of its protocol.*base URL"
    ):
        open_chat_model(f"{provider}:m", tmp_path / "c")(["x"], max_tokens=5)


def test_a_model_that_refuses_has_said_nothing(server, tmp_path):
    refused = {"index": 0, "message": {"role": "assistant", "content": None, "refusal": "no"}}
    server.reply = lambda prompt: (200, {"choices": [refused]})
    assert open_chat_model("openai:m", tmp_path / "c")(["x"], max_tokens=5) == [""]


def test_empty_answers_are_not_kept(tmp_path):
    said = {"a": "A", "b": " \n", "c": "C"}
    chat = CachedChat("x", lambda prompts, n: ((p, said[p]) for p in prompts), tmp_path / "c")
    assert chat(["b", "a", "c"], max_tokens=1) == ["", "A", "C"]
    said |= {"a": "not asked again", "b": "B"}
    assert chat(["b", "a", "c"], max_tokens=1) == ["B", "A", "C"]


def test_a_model_that_answers_nothing_is_not_asked_on(tmp_path):
    asked = []

    def backend(prompts, max_tokens):
        for prompt in prompts:
            asked.append(prompt)
            yield prompt, prompt if prompt in ("1", "9") else ""

    chat, prompts = CachedChat("x", backend, tmp_path / "c"), [str(i) for i in range(30)]
    with pytest.raises(RuntimeError, match=r"x gave 8 empty answers in a row \(limit: 5 tokens\)"):
        chat(prompts, max_tokens=5)
    assert asked == prompts[:18]
    assert chat(["1", "9"], max_tokens=5) == ["1", "9"] and len(asked) == 18


def test_halves_of_characters_are_asked_and_kept(tmp_path):
    chat = CachedChat("x", lambda prompts, n: ((p, f"{p}\ud800") for p in prompts), tmp_path / "c")
    assert chat(["a\udc00"], max_tokens=1) == ["a??"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_missing_key_or_package_is_named(provider, monkeypatch, tmp_path):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"{provider}:m needs a key: set {provider.upper()}_API_KEY"):
        open_chat_model(f"{provider}:m", tmp_path / "c")
    monkeypatch.setitem(sys.modules, provider, None)
    with pytest.raises(
        ModuleNotFoundError, match=f"{provider}:MODEL needs the package {provider}: pip install"
    ):
        open_chat_model(f"{provider}:m", tmp_path / "c")


@pytest.mark.parametrize("name", ["gpt-4", "anthropic:", "claude:x", ":m"])
def test_a_malformed_name_is_refused_by_the_config(name):
    with pytest.raises(
        ValueError, match=f"the chat model '{name}' is not PROVIDER:MODEL.*anthropic, openai, local"
    ):
        EvaluationConfig(chat_model=name)
    assert EvaluationConfig().chat_model == ""


def test_a_local_model_answers_in_order(tmp_path):
    talker = write_tiny_model(tmp_path / "talker", seed=2)
    chat = open_chat_model(f"local:{talker}", tmp_path / "c")
    long = "A dictionary that maps every key to a count of its values, and more words to make it long enough"
    # What its likeliest tokens are; tests/data/explainers/test_local.py has them from plain forward passes.
    found = chat(["Return a list of the words in the string", long, "Parse one argument"], max_tokens=5)
    assert found == ["2 to to to to", "l l l l l", "to to to to to"]


def test_a_local_model_that_is_not_there_is_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at 'nowhere'"):
        open_chat_model("local:nowhere", tmp_path / "c")


def test_a_base_model_cannot_be_asked(tiny_model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no chat template.*instruction-tuned"):
        open_chat_model(f"local:{base}", tmp_path / "c")(["x"], max_tokens=5)


def test_answers_in_a_bucket_outlive_an_error_and_are_paid_once(bucket):
    asked = []

    def backend(prompts, max_tokens):
        for prompt in prompts:
            asked.append(prompt)
            if prompt == "c" and asked.count("c") == 1:
                raise RuntimeError("no connection")
            yield prompt, f"<{prompt}>"

    path = as_path(f"{bucket}/run/evaluation/chat.sqlite")
    with pytest.raises(RuntimeError, match="no connection"):
        CachedChat("m", backend, path)(["a", "b", "c"], max_tokens=5)
    assert CachedChat("m", backend, path)(["c", "b", "a"], max_tokens=5) == ["<c>", "<b>", "<a>"]
    assert asked == ["a", "b", "c", "c"]
