import dataclasses

import pytest
from chat_server import ChatServer

from nla_jax.chat.config import ChatConfig
from nla_jax.chat.estimates import count_tokens, counted_tokens, estimate
from nla_jax.chat.models import open_chat_model
from nla_jax.chat.prices import Price, load_prices, price_of
from nla_jax.chat.store import BudgetSpent

PRICES = '{"anthropic:m": {"input": 1000, "output": 5000}}'
"""The server says 100 tokens in and 10 out for an answer, which then costs 0.15 dollars."""


@pytest.fixture
def server(monkeypatch):
    opened = ChatServer()
    monkeypatch.setenv("ANTHROPIC_BASE_URL", opened.url)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key")
    yield opened
    opened.close()


@pytest.fixture
def priced(tmp_path) -> ChatConfig:
    (tmp_path / "prices.json").write_text(PRICES)
    return ChatConfig("anthropic:m", prices=str(tmp_path / "prices.json"), concurrency=1)


def test_a_budget_stops_before_the_next_request_and_counts_over_runs(server, priced, tmp_path):
    prompts = [str(i) for i in range(10)]
    thrifty = dataclasses.replace(priced, budget=0.44)
    with pytest.raises(BudgetSpent, match=r"\$0.4500 were spent, the budget is \$0.44, and 7 of 10 prompts"):
        open_chat_model(thrifty, tmp_path / "c")(prompts, max_tokens=5)
    assert server.asked == ["0", "1", "2"]
    # In the next run, and for what is on record.
    with pytest.raises(BudgetSpent):
        open_chat_model(thrifty, tmp_path / "c")(prompts, max_tokens=5)
    assert server.asked == ["0", "1", "2"]
    assert open_chat_model(thrifty, tmp_path / "c")(prompts[:3], max_tokens=5) == ["<0>", "<1>", "<2>"]
    # Refused prompts and other parameters cost as well.
    richer = open_chat_model(dataclasses.replace(priced, budget=10.0), tmp_path / "c")
    assert richer(prompts, max_tokens=5) == [f"<{prompt}>" for prompt in prompts]
    assert richer.spent() == pytest.approx(1.5)
    richer(prompts, max_tokens=6)
    assert richer.spent() == pytest.approx(3.0)


def test_many_requests_at_a_time_stay_within_the_budget(server, priced, tmp_path):
    server.seconds = 0.02
    config = dataclasses.replace(priced, concurrency=64, budget=6.0)
    chat = open_chat_model(config, tmp_path / "c")
    with pytest.raises(BudgetSpent):
        chat([str(i) for i in range(200)], max_tokens=5)
    # Those under way count as spent, so no request goes beyond the budget but the one that reaches it.
    assert 6.0 <= chat.spent() < 6.0 + 2 * 0.15
    assert len(server.asked) == round(chat.spent() / 0.15)


def test_a_budget_needs_a_price(server, tmp_path):
    with pytest.raises(ValueError, match="the budget is .5, and the price of anthropic:m is not known"):
        open_chat_model(ChatConfig("anthropic:m", budget=5.0), tmp_path / "c")


def test_an_estimate_counts_what_is_not_on_record(server, priced, tmp_path):
    prompts, cache = ["a b", "c d e", "a b", "f"], tmp_path / "c"
    before = estimate(priced, prompts, instruction="x y", max_tokens=7, cache=cache)
    # Words are tokens; the instruction is read three times, and there are 1,024 tokens for thoughts.
    assert (before.prompts, before.cached, before.input_tokens) == (3, 0, 12)
    assert before.output_tokens_at_most == 3 * (7 + 1024)
    assert before.dollars == pytest.approx((12 * 1000 + 3 * 1031 * 5000) / 1e6)
    assert (before.usual_dollars, before.seconds, before.counted_by) == (None, None, "the provider")
    assert server.asked == []
    open_chat_model(priced, cache).answers(prompts[:1], instruction="x y", max_tokens=7)
    after = estimate(priced, prompts, instruction="x y", max_tokens=7, cache=cache)
    assert (after.prompts, after.cached, after.input_tokens) == (3, 1, 8)
    assert after.usual_dollars == pytest.approx(2 * 0.15) and 0 < after.seconds < 10
    half = estimate(
        dataclasses.replace(priced, batch=True), prompts, instruction="x y", max_tokens=7, cache=cache
    )
    assert half.dollars == pytest.approx(after.dollars / 2) and half.seconds is None
    everything = estimate(priced, prompts[:1], instruction="x y", max_tokens=7, cache=cache)
    assert (everything.input_tokens, everything.dollars) == (0, 0.0)


def test_an_estimate_needs_no_key_and_no_network(monkeypatch):
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for model in ("anthropic:m", "openai:m"):
        assert counted_tokens(ChatConfig(model), ["x" * 41]) == (11, "characters, 4 to a token")
        assert estimate(model, ["x"], max_tokens=5).dollars is None


def test_a_local_model_counts_with_its_tokenizer_and_is_free(tiny_model_dir, tiny_lm):
    texts = ["Return a list of the words", "Parse one argument"]
    expected = sum(len(tiny_lm.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert count_tokens(f"local:{tiny_model_dir}", texts) == expected
    found = estimate(f"local:{tiny_model_dir}", texts, max_tokens=5)
    assert (found.input_tokens, found.output_tokens_at_most, found.dollars) == (expected, 10, 0.0)


def test_prices_of_a_file_stand_before_the_list(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "openai:gpt-4.1: {input: 3, output: 4.5}\nopenai:mine: {input: 0, output: 0}\n"
    )
    prices = load_prices(tmp_path / "p.yaml")
    assert price_of("openai:gpt-4.1", prices) == Price(3.0, 4.5)
    assert price_of("openai:mine", prices) == Price(0.0, 0.0)
    assert price_of("anthropic:claude-haiku-4-5-20251001", prices) == Price(1.0, 5.0)
    assert price_of("openai:gpt-4.1-2025-04-14", prices) == Price(3.0, 4.5)
    assert price_of("openai:gpt-4.1-other", prices) is None
    assert Price(2.0, 8.0).dollars(1_000_000, 500_000) == 6.0
    assert Price(2.0, 8.0).dollars(1_000_000, 500_000, batch=True) == 3.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1", "neither JSON nor YAML"),
        ("[1]", "expected a price in US dollars"),
        ("openai:m: 3", "the price of openai:m is 3; expected a price"),
        ("openai:m: {input: -1, output: 2}", "the price of openai:m is"),
        ("gpt: {input: 1, output: 2}", "the chat model 'gpt' is not PROVIDER:MODEL"),
    ],
)
def test_files_that_hold_no_prices(tmp_path, text, message):
    (tmp_path / "p").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prices(tmp_path / "p")


def test_a_missing_file_with_prices(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file with prices at"):
        load_prices(tmp_path / "p")
