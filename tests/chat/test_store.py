import sqlite3

import pytest

from nla_jax.chat.models import CachedChat
from nla_jax.chat.prices import Price
from nla_jax.chat.replies import Answer, Parameters, Reply
from nla_jax.chat.store import open_store


def silent(prompts, parameters, allowance):
    """A back end that must not be asked for anything."""
    assert not prompts
    yield from ()


def test_answers_of_the_first_version_are_read(tmp_path):
    with sqlite3.connect(tmp_path / "c") as db:
        columns = "model text, max_tokens integer, prompt text, answer text"
        db.execute(f"create table answers ({columns}, primary key (model, max_tokens, prompt))")
        rows = [("a:m", 5, "x", "<x>"), ("a:m", 6, "x", "<x6>"), ("a:n", 5, "x", "<xn>")]
        db.executemany("insert into answers values (?, ?, ?, ?)", rows)
    db.close()
    for model, max_tokens, text in (("a:m", 5, "<x>"), ("a:m", 6, "<x6>"), ("a:n", 5, "<xn>")):
        assert CachedChat(model, silent, tmp_path / "c")(["x"], max_tokens=max_tokens) == [text]
    with sqlite3.connect(tmp_path / "c") as db:
        assert db.execute("select count(*), sum(key is null) from answers").fetchone() == (3, 0)
    db.close()


def test_many_answers_are_found_by_everything_that_decides_them(tmp_path):
    parameters = [
        Parameters(5),
        Parameters(5, "Count."),
        Parameters(5, "", 0.5),
        Parameters(5, thinking_tokens=0),
    ]
    prompts = [str(i) for i in range(1200)]
    with open_store(tmp_path / "c", "a:m", prices={}) as store:
        for number, of in enumerate(parameters):
            store.keep([Reply(prompt, Answer(f"{prompt} {number}")) for prompt in prompts], of)
    with open_store(tmp_path / "c", "a:m", prices={}) as store:
        for number, of in enumerate(parameters):
            assert store.find(prompts, of) == {prompt: Answer(f"{prompt} {number}") for prompt in prompts}
        assert store.find(prompts, Parameters(6)) == {}
    with open_store(tmp_path / "c", "a:n", prices={}) as store:
        assert store.find(prompts, parameters[0]) == {}


def test_what_was_spent_outlives_the_answer(tmp_path):
    prices, parameters = {"openai:m": Price(1000.0, 5000.0)}, Parameters(5)
    with open_store(tmp_path / "c", "openai:m", prices=prices) as store:
        assert (store.spent(), store.usual(), store.seconds()) == (0.0, None, None)
        store.keep(
            [Reply("x", Answer("", "refused"), 100, 10), Reply("y", Answer("Y"), 300, 10, 2.0)], parameters
        )
        store.forget_problems(["x", "y"], parameters)
        assert store.find(["x", "y"], parameters) == {"y": Answer("Y")}
        assert store.spent() == pytest.approx(0.5) and store.usual() == pytest.approx(0.25)
        assert store.seconds() == 2.0
    # Without a count a token is taken to have four characters.
    with open_store(tmp_path / "d", "openai:m", prices=prices) as store:
        store.keep([Reply("x" * 400, Answer("y" * 40))], Parameters(5, "z" * 400))
        assert store.spent() == pytest.approx(0.25)
    # A model without a price adds nothing.
    with open_store(tmp_path / "c", "openai:n", prices=prices, budget=0.6) as store:
        store.keep([Reply("x", Answer("X"), 100, 10)], parameters)
        assert store.spent() == pytest.approx(0.5) and store.usual() is None
        assert store.may_send(100)


def test_a_file_that_is_no_store_is_named(tmp_path):
    (tmp_path / "c").write_text("These are not answers, but a text that is long enough to be no database.")
    with pytest.raises(ValueError, match="c is not a file with answers of chat models"):
        CachedChat("a:m", silent, tmp_path / "c")(["x"], max_tokens=5)
    with sqlite3.connect(tmp_path / "d") as db:
        db.execute("pragma user_version = 9")
    db.close()
    with pytest.raises(ValueError, match="d was written by a later version of nla_jax"):
        CachedChat("a:m", silent, tmp_path / "d")(["x"], max_tokens=5)


def test_a_full_disk_is_named_and_what_was_kept_stays(tmp_path):
    with pytest.raises(OSError, match="cannot be kept in .*c: database or disk is full; make room"):  # noqa: SIM117
        with open_store(tmp_path / "c", "a:m", prices={}) as store:
            store.keep([Reply("x", Answer("X"))], Parameters(5))
            (pages,) = store.db.execute("pragma page_count").fetchone()
            store.db.execute(f"pragma max_page_count = {pages}")
            store.keep([Reply("y", Answer("Y" * 100_000))], Parameters(5))
    with open_store(tmp_path / "c", "a:m", prices={}) as store:
        assert store.find(["x", "y"], Parameters(5)) == {"x": Answer("X")}


def test_a_folder_that_is_not_there(tmp_path):
    with (
        pytest.raises(OSError, match="cannot be kept in .*c: unable to open database file"),
        open_store(tmp_path / "nowhere" / "c", "a:m", prices={}),
    ):
        pass
