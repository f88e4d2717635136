import queue
import threading

import pytest

from nla_jax.chat import sending
from nla_jax.chat.replies import Answer, Failure, Parameters, Reply
from nla_jax.chat.sending import TEST_PROMPT, ConcurrencyLimit, Sender

PARAMETERS = Parameters(5)


class Unlimited:
    def may_send(self, under_way):
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sending, "SHORTEST_WAIT", 0.001)


def asked(ask, prompts, concurrency=8) -> list[Reply]:
    sender = Sender("a:m", ask, concurrency)
    return [reply for replies in sender(prompts, PARAMETERS, Unlimited()) for reply in replies]


def play(limit: ConcurrencyLimit, replies: int, *, share_failing: float = 0.0, kind: str = "server") -> int:
    """The limit after a number of replies of which every so manieth fails."""
    every = round(1 / share_failing) if share_failing else 0
    for number in range(1, replies + 1):
        limit.count(1.0, kind if every and number % every == 0 else None)
    return limit.value


def test_the_limit_grows_to_the_most_under_a_few_faults():
    assert play(ConcurrencyLimit(256), 600, share_failing=0.2) == 256
    assert ConcurrencyLimit(2).value == 2


def test_the_limit_shrinks_where_many_requests_are_refused_and_recovers():
    limit = ConcurrencyLimit(256)
    # Three rounds of 16, and rounds of 32, 64 and 128.
    assert play(limit, 272) == 256
    assert play(limit, 256, share_failing=0.5) == 179
    assert play(limit, 179 + 125, share_failing=1.0) == 87
    assert play(limit, 87) == 97
    assert play(limit, 97 + 67 + 46 + 32 + 22 + 5 * 16, share_failing=1.0) == 1
    assert play(limit, 16) == 2


def test_the_limit_settles_where_hardly_any_request_is_refused_as_too_many():
    limit, slots, refused, served = ConcurrencyLimit(256), 64, 0, 0
    values = []
    while served < 2000:
        now = limit.value
        for place in range(max(now, ConcurrencyLimit.ROUND)):
            is_refused = place % now >= slots
            refused += is_refused
            limit.count(1.0, "busy" if is_refused else None)
            served += not is_refused
        values.append(limit.value)
    assert all(slots * 0.9 < value < slots * 1.15 for value in values[-10:])
    assert refused < 0.12 * served


def test_the_limit_stays_where_replies_come_from_a_queue():
    limit, served = ConcurrencyLimit(256), 0
    while served < 3000:
        # One request at a time takes a second, so the last one waits for all before it.
        for place in range(limit.value):
            limit.count(float(place + 1))
        served += limit.value
    assert 4 < limit.value < 64


def test_no_more_requests_are_under_way_than_the_limit_says():
    lock, under_way, most = threading.Lock(), set(), []

    def ask(prompt, parameters):
        with lock:
            under_way.add(prompt)
            most.append(len(under_way))
        threading.Event().wait(0.001)
        with lock:
            under_way.discard(prompt)
        return Reply(prompt, Answer(prompt))

    prompts = [str(i) for i in range(300)]
    assert sorted(reply.prompt for reply in asked(ask, prompts)) == sorted(prompts)
    assert max(most) == 8


def test_the_wait_that_a_server_asks_for_is_kept(monkeypatch):
    waits = []
    monkeypatch.setattr(sending, "waiting_time", lambda tries, wait: waits.append((tries, wait)) or 0.0)
    outcomes = iter([Failure("busy", "slow", 7.0), Failure("server", "broken"), Reply("x", Answer("X"))])

    def ask(prompt, parameters):
        if isinstance(outcome := next(outcomes), Failure):
            raise outcome
        return outcome

    assert [reply.answer.text for reply in asked(ask, ["x"])] == ["X"]
    assert waits == [(1, 7.0), (2, 0.0)]


def test_waits_grow_and_spread(monkeypatch):
    monkeypatch.setattr(sending, "SHORTEST_WAIT", 0.5)
    for tries, most in ((1, 0.5), (2, 1.0), (5, 8.0), (20, 60.0)):
        waits = [sending.waiting_time(tries, 0.0) for _ in range(50)]
        assert most / 2 <= min(waits) and max(waits) <= most and len(set(waits)) > 40
    assert 7.0 <= sending.waiting_time(3, 7.0) <= 7.0 * 1.2
    assert sending.waiting_time(3, 1e9) <= 720


@pytest.mark.parametrize("kind", ["prompt", "server"])
def test_many_prompts_in_a_row_that_fail_always_end_nothing(kind):
    sent = []

    def ask(prompt, parameters):
        sent.append(prompt)
        if prompt.startswith("bad"):
            raise Failure(kind, "no")
        return Reply(prompt, Answer(prompt))

    bad = [f"bad {i}" for i in range(50)]
    replies = {reply.prompt: reply.answer for reply in asked(ask, [*bad, "good"])}
    assert replies == {
        **dict.fromkeys(bad, Answer("", "no")),
        "good": Answer("good"),
        TEST_PROMPT: Answer(TEST_PROMPT),
    }
    # Once after 32 of them, and once more where the last of all has failed.
    assert 1 <= sent.count(TEST_PROMPT) <= 2


def test_a_long_silence_ends_asking_before_every_try_was_made(monkeypatch):
    monkeypatch.setattr(sending, "SILENCE", 0.0)
    sent = []

    def ask(prompt, parameters):
        sent.append(prompt)
        raise Failure("server", "the server did not reply in time")

    with pytest.raises(RuntimeError, match="a:m gave no answer .the server did not reply in time"):
        asked(ask, [str(i) for i in range(100)])
    assert len(sent) < 20


class InterruptedQueue(queue.Queue):
    """A queue whose second wait is interrupted."""

    waits = 0

    def get(self, block=True, timeout=None):
        self.waits += block
        if block and self.waits == 2:
            raise KeyboardInterrupt
        return super().get(block, timeout)


def test_what_is_under_way_at_an_interrupt_is_kept(monkeypatch):
    monkeypatch.setattr(queue, "SimpleQueue", InterruptedQueue)
    replies, prompts = [], [str(i) for i in range(100)]
    with pytest.raises(KeyboardInterrupt):
        for some in Sender("a:m", lambda prompt, _: Reply(prompt, Answer(prompt)), 8)(
            prompts, PARAMETERS, Unlimited()
        ):
            replies += some
    # The first four were sent at once, and as many more as replies had come.
    assert 4 <= len(replies) <= 8 and {reply.prompt for reply in replies} == set(prompts[: len(replies)])
