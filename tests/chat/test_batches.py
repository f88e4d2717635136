import dataclasses
import sqlite3

import pytest
from chat_server import ChatServer

from nla_jax.chat import batches, sending
from nla_jax.chat.config import ChatConfig
from nla_jax.chat.models import open_chat_model
from nla_jax.chat.sending import TEST_PROMPT
from nla_jax.chat.store import BudgetSpent

PROMPTS = [str(i) for i in range(6)]
TEXTS = [f"<{prompt}>" for prompt in PROMPTS]


@pytest.fixture
def server(monkeypatch):
    opened = ChatServer()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", opened.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    monkeypatch.setattr(batches, "FIRST_POLL", 0.01)
    monkeypatch.setattr(sending, "SHORTEST_WAIT", 0.001)
    monkeypatch.setattr(sending, "LONGEST_WAIT", 0.01)
    yield opened
    opened.close()


@pytest.fixture
def config(tmp_path) -> ChatConfig:
    (tmp_path / "prices.json").write_text('{"anthropic:m": {"input": 1000, "output": 5000}}')
    return ChatConfig("anthropic:m", batch=True, prices=str(tmp_path / "prices.json"))


def sizes(server: ChatServer) -> list[int]:
    return [len(batch["requests"]) for batch in server.batches.values()]


def test_a_batch_answers_at_half_the_price(server, config, tmp_path):
    chat = open_chat_model(config, tmp_path / "c")
    server.polls = 3
    answers = chat.answers(PROMPTS, instruction="Count.", max_tokens=5, temperature=0.5)
    assert [answer.text for answer in answers] == TEXTS
    (batch,) = server.batches.values()
    sent = batch["requests"][0]["params"]
    assert (sent["system"], sent["temperature"], sent["max_tokens"]) == ("Count.", 0.5, 5 + 1024)
    assert batch["polls"] >= 3 and server.asked == []
    assert chat.spent() == pytest.approx(6 * 0.15 / 2)
    # It is on record for those who ask alone as well.
    alone = open_chat_model(dataclasses.replace(config, batch=False), tmp_path / "c")
    assert alone.answers(PROMPTS, instruction="Count.", max_tokens=5, temperature=0.5) == answers
    assert sizes(server) == [6] and server.asked == []


def test_batches_that_are_sent_ahead_are_under_way_together_and_sent_once(server, config, tmp_path):
    chat = open_chat_model(config, tmp_path / "c")
    for some in (PROMPTS[:2], PROMPTS[1:4], PROMPTS[:4]):
        chat.send_batches(some, max_tokens=5)
    assert sizes(server) == [2, 2]
    assert [answer.text for answer in chat.answers(PROMPTS, max_tokens=5)] == TEXTS
    assert sizes(server) == [2, 2, 2]
    chat.send_batches(PROMPTS, max_tokens=5)
    assert sizes(server) == [2, 2, 2]


def test_the_budget_counts_what_other_batches_hold(server, config, tmp_path):
    chat = open_chat_model(dataclasses.replace(config, budget=5 * 0.075 - 0.01), tmp_path / "c")
    chat([TEXTS[0]], max_tokens=5)
    for prompt in PROMPTS:
        chat.send_batches([prompt], max_tokens=5)
    assert sizes(server) == [1] * 5


def test_without_message_batches_nothing_is_sent_ahead(server, config, tmp_path):
    chat = open_chat_model(dataclasses.replace(config, batch=False), tmp_path / "c")
    chat.send_batches(PROMPTS, max_tokens=5)
    assert sizes(server) == [] and server.asked == []


class Killed(BaseException):
    pass


def kill(*_, **__):
    raise Killed


@pytest.mark.parametrize("batch", [True, False])
def test_a_killed_run_finds_its_batches_again(server, config, tmp_path, monkeypatch, batch):
    with monkeypatch.context() as patch:
        patch.setattr(batches.MessageBatches, "_wait_for", kill)
        with pytest.raises(Killed):
            open_chat_model(config, tmp_path / "c")(PROMPTS[:4], max_tokens=5)
    again = open_chat_model(dataclasses.replace(config, batch=batch), tmp_path / "c")
    assert again(PROMPTS, max_tokens=5) == TEXTS
    assert (sizes(server), sorted(server.asked)) == (([4, 2], []) if batch else ([4], ["4", "5"]))
    assert set(server.answered.values()) == {1}


def test_a_run_that_was_killed_before_it_learned_the_id_pays_once(server, config, tmp_path, monkeypatch):
    server.batches["other"] = {"requests": [None] * 3, "polls": 9, "created_at": "2026-01-01T00:00:00Z"}
    with monkeypatch.context() as patch:
        patch.setattr("nla_jax.chat.store.AnswerStore.name_batch", kill)
        with pytest.raises(Killed):
            open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5)
    assert open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5) == TEXTS
    assert sizes(server) == [3, 6]


def test_a_run_that_was_killed_before_it_sent_sends(server, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(batches.MessageBatches, "_call", kill)
        with pytest.raises(Killed):
            open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5)
    assert server.batches == {}
    assert open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5) == TEXTS
    with sqlite3.connect(tmp_path / "c") as db:
        assert db.execute("select count(*) from batches").fetchone() == (0,)


def test_prompts_that_a_batch_refuses_are_put_on_record_and_others_sent_again(server, config, tmp_path):
    ends = {"1": iter(["expired", "succeeded"]), "2": iter(["api_error"] * 3)}
    server.ends = lambda prompt: (
        "invalid_request_error" if prompt == "0" else next(ends.get(prompt, iter(())), "succeeded")
    )
    answers = open_chat_model(config, tmp_path / "c").answers(PROMPTS, max_tokens=5)
    assert [answer.text for answer in answers] == ["", "<1>", "", *TEXTS[3:]]
    assert (
        answers[0].problem == "invalid_request_error of 0"
        and answers[2].problem == "api_error: api_error of 2"
    )
    assert sizes(server) == [6, 2, 1]
    assert open_chat_model(config, tmp_path / "c").answers(PROMPTS, max_tokens=5) == answers
    assert sizes(server) == [6, 2, 1]


def test_a_batch_that_is_refused_as_a_whole_blames_no_prompt(server, config, tmp_path):
    server.ends = lambda prompt: "invalid_request_error"
    server.reply = lambda prompt: (400, {"error": {"message": "temperature is not for this model"}})
    with pytest.raises(RuntimeError, match="temperature is not for this model"):
        open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5)
    assert server.asked == [TEST_PROMPT]
    server.ends, server.reply = lambda prompt: "succeeded", lambda prompt: f"<{prompt}>"
    assert open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5) == TEXTS


def test_large_batches_are_divided(server, config, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MOST_PROMPTS", 4)
    assert open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=5) == TEXTS
    monkeypatch.setattr(batches, "MOST_CHARACTERS", 2)
    open_chat_model(config, tmp_path / "c")(PROMPTS, max_tokens=6)
    assert sizes(server) == [4, 2, 2, 2, 2]


def test_no_more_is_sent_in_a_batch_than_the_budget_allows(server, config, tmp_path):
    open_chat_model(config, tmp_path / "c")(["first"], max_tokens=5)
    with pytest.raises(BudgetSpent, match="2 of 6 prompts are not asked"):
        open_chat_model(dataclasses.replace(config, budget=5 * 0.075 - 0.01), tmp_path / "c")(
            PROMPTS, max_tokens=5
        )
    assert sizes(server) == [1, 4]
