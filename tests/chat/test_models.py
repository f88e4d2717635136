"""The real SDKs against a server of our own."""

import json
import shutil
import sqlite3
import sys
import threading

import pytest
from chat_server import FAULTS, ChatServer, Fault, random_faults
from tiny_model import write_tiny_model

from nla_jax.chat import sending
from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import CachedChat, open_chat_model
from nla_jax.chat.providers import _answer
from nla_jax.chat.replies import Answer, Reply
from nla_jax.chat.sending import TEST_PROMPT
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.files import as_path

PROVIDERS = ("anthropic", "openai")


@pytest.fixture
def server(monkeypatch):
    found = ChatServer()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", found.url)
    monkeypatch.setenv("OPENAI_BASE_URL", f"{found.url}/v1")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setattr(sending, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(sending, "LONGEST_WAIT", 0.01)
    yield found
    found.close()


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
@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_was_answered_beside_a_failure_of_all_is_kept(server, provider, status, tmp_path):
    others, failed = threading.Semaphore(0), threading.Event()

    def reply(prompt):
        if prompt == "bad":
            assert others.acquire(timeout=30) and others.acquire(timeout=30)
            failed.set()
            return status, {"error": {"message": "not for you"}}
        others.release()
        assert failed.wait(30)
        return f"<{prompt}>"

    server.reply = reply
    chat = open_chat_model(f"{provider}:m", tmp_path / "c")
    message = f"{provider}:m gave no answer.*not for you.*key.*base URL.*the same command goes on"
    with pytest.raises(RuntimeError, match=message):
        chat(["good", "fine", "bad", *map(str, range(50))], max_tokens=5)
    assert len(server.asked) < 20
    server.asked.clear()
    server.reply = str.upper
    assert chat(["good", "fine", "bad"], max_tokens=5) == ["<good>", "<fine>", "BAD"]
    assert server.asked == ["bad"]


def test_an_account_without_credit_ends_asking(server, tmp_path):
    for provider, status, error in (
        ("openai", 429, {"message": "You exceeded your quota", "code": "insufficient_quota"}),
        ("anthropic", 400, {"type": "invalid_request_error", "message": "Your credit balance is too low"}),
    ):
        server.reply = lambda prompt, answer=(status, {"error": error}): answer
        with pytest.raises(RuntimeError, match="the account has no credit"):
            open_chat_model(f"{provider}:m", tmp_path / "c")(["x"], max_tokens=5)
    assert server.asked == ["x", "x"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    "answer", [(400, {"error": {"message": "no tokens"}}), *map(Fault, ("500", "cut", "429"))]
)
def test_a_prompt_that_always_fails_is_put_on_record_and_skipped(server, provider, answer, tmp_path):
    server.reply = lambda prompt: answer if prompt == "bad" else f"<{prompt}>"
    prompts = ["a", "bad", "b"]
    chat = open_chat_model(f"{provider}:m", tmp_path / "c")
    answers = chat.answers(prompts, max_tokens=5)
    assert [answer.text for answer in answers] == ["<a>", "", "<b>"]
    assert [bool(answer.problem) for answer in answers] == [False, True, False]
    tries = server.asked.count("bad")
    assert (
        tries
        == {400: 1, "500": 6, "cut": 6, "429": 24}[answer[0] if isinstance(answer, tuple) else answer.kind]
    )
    assert open_chat_model(f"{provider}:m", tmp_path / "c").answers(prompts, max_tokens=5) == answers
    assert server.asked.count("bad") == tries
    # It is asked again on demand alone.
    server.reply = str.upper
    again = open_chat_model(ChatConfig(f"{provider}:m", ask_again=True), tmp_path / "c")
    assert again(prompts, max_tokens=5) == ["<a>", "BAD", "<b>"]


def test_the_last_prompt_of_all_may_fail_always(server, tmp_path):
    server.reply = lambda prompt: Fault("500") if prompt == "bad" else "hello"
    chat = open_chat_model("anthropic:m", tmp_path / "c")
    (answer,) = chat.answers(["bad"], max_tokens=5)
    assert answer.text == "" and "fault" in answer.problem
    assert server.asked == ["bad"] * 6 + [TEST_PROMPT]


@pytest.mark.parametrize("fault", ["500", "stall", "empty", "refused"])
def test_a_server_that_answers_nothing_ends_asking_and_blames_no_prompt(server, fault, tmp_path, monkeypatch):
    monkeypatch.setattr(sending, "WITHOUT_ANSWER", 8)
    server.reply, server.stall, prompts = lambda prompt: Fault(fault), 0.5, [str(i) for i in range(60)]
    config = ChatConfig("openai:m", timeout=0.1, concurrency=40)
    with pytest.raises(RuntimeError, match="openai:m gave no answer.*Answers so far are kept"):
        open_chat_model(config, tmp_path / "c").answers(prompts, max_tokens=5)
    server.reply = str.upper
    answers = open_chat_model(config, tmp_path / "c").answers(prompts, max_tokens=5)
    if fault in ("500", "stall"):
        assert [answer.text for answer in answers] == prompts
    else:  # These were paid for.
        assert 0 < sum(bool(answer.problem) for answer in answers) < 60


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_server_that_is_not_there_is_named(server, provider, tmp_path):
    server.close()
    with pytest.raises(RuntimeError, match=f"{provider}:m gave no answer .*the connection failed.*base URL"):
        open_chat_model(f"{provider}:m", tmp_path / "c")(["x", "y"], max_tokens=5)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("body", [{"detail": "hello"}, "hello", {"choices": [], "content": 3}])
def test_a_reply_of_another_protocol_is_named(server, provider, body, tmp_path):
    server.reply = lambda prompt: (200, body)
    with pytest.raises(
        RuntimeError,
        match=f"{provider}:m gave no answer .it sent a reply that is not of its protocol.*base URL",
    ):
        open_chat_model(f"{provider}:m", tmp_path / "c")(["x"], max_tokens=5)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_model_that_refuses_has_said_nothing(server, provider, tmp_path):
    server.reply = lambda prompt: Fault("refused") if prompt == "x" else prompt
    chat = open_chat_model(f"{provider}:m", tmp_path / "c")
    assert chat.answers(["x", "y"], max_tokens=5) == [Answer("", "the model refused to answer"), Answer("y")]
    assert chat(["x"], max_tokens=5) == [""] and server.asked.count("x") == 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_instruction_is_the_system_prompt(server, provider, tmp_path):
    chat = open_chat_model(f"{provider}:m", tmp_path / "c")
    (answer,) = chat.answers(["x"], instruction="Count.", max_tokens=5, temperature=0.5)
    assert answer == Answer("<x>")
    (body,) = server.requests
    system = [turn["content"] for turn in body["messages"] if turn["role"] == "system"]
    assert (system, body.get("system")) == (([], "Count.") if provider == "anthropic" else (["Count."], None))
    assert body["temperature"] == 0.5
    # Another instruction or temperature is another question.
    chat.answers(["x"], instruction="Count!", max_tokens=5, temperature=0.5)
    chat.answers(["x"], instruction="Count.", max_tokens=5)
    chat.answers(["x"], instruction="Count.", max_tokens=5, temperature=0.5)
    assert len(server.requests) == 3 and "temperature" not in server.requests[-1]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_fifth_of_faults_loses_nothing_and_asks_nothing_twice(server, provider, tmp_path):
    server.reply, server.stall = random_faults(0.2, lambda prompt: f"<{prompt}>"), 0.6
    prompts = [f"{provider} {i}" for i in range(150)]
    config = ChatConfig(f"{provider}:m", timeout=0.3)
    answers = open_chat_model(config, tmp_path / "c").answers(prompts, max_tokens=5)
    assert set(server.faults) == set(FAULTS)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.text == f"<{prompt}>" if not answer.problem else answer.text == ""
    assert (
        sum(bool(answer.problem) for answer in answers) == server.faults["refused"] + server.faults["empty"]
    )
    assert set(server.answered.values()) == {1} and len(server.answered) == 150
    asked = len(server.asked)
    again = open_chat_model(config, tmp_path / "c")
    assert again.answers(prompts, max_tokens=5) == answers
    assert len(server.asked) == asked


def saying(answers: dict[str, str], asked: list):
    """A back end that answers one prompt after the other."""

    def backend(prompts, parameters, allowance):
        for prompt in prompts:
            asked.append(prompt)
            yield [Reply(prompt, Answer(answers[prompt]))]

    return backend


def test_halves_of_characters_are_asked_and_kept(tmp_path):
    chat = CachedChat("x:y", saying({"a?": "b"}, []), tmp_path / "c")
    assert chat(["a\udc00"], max_tokens=1) == ["b"]
    assert _answer("b\ud800", "") == Answer("b?")


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

    def backend(prompts, parameters, allowance):
        for prompt in prompts:
            asked.append(prompt)
            if prompt == "c" and asked.count("c") == 1:
                raise RuntimeError("no connection")
            yield [Reply(prompt, Answer(f"<{prompt}>"))]

    path = as_path(f"{bucket}/run/evaluation/chat.sqlite")
    with pytest.raises(RuntimeError, match="no connection"):
        CachedChat("m", backend, path)(["a", "b", "c"], max_tokens=5)
    assert CachedChat("m", backend, path)(["c", "b", "a"], max_tokens=5) == ["<c>", "<b>", "<a>"]
    assert asked == ["a", "b", "c", "c"]
