"""Many requests at a time to one server: as many as it bears, again where it fails, and no more than may be paid for.

One thread decides everything; the others send a request each and put what came of it into a queue. The number of
requests under way grows from round to round and shrinks where the server refuses or breaks many of them, or becomes
slow, as that of a queue does. A request that fails is sent again later. One that goes on failing is put on record
without an answer as soon as any other answer, if need be that to a test prompt, shows that the server works; if none
does, the run ends, and nothing is on record that the server alone is to blame for.
"""

import dataclasses
import heapq
import queue
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from nla_jax.chat.replies import Allowance, Answer, Failure, FailureKind, Parameters, Reply

Ask = Callable[[str, Parameters], Reply]
"""Sends one prompt and waits for the reply. It raises a Failure where there is none."""

TRIES = {"prompt": 1, "server": 6, "busy": 24, "nonsense": 6, "unreachable": 6}
"""Kind of failure -> how often a prompt is sent before it counts as failing always."""
TRIES_AT_FIRST = 3
"""How often a prompt is sent to a server that has answered nothing yet, and cannot be reached or sends nonsense."""
SHORTEST_WAIT, LONGEST_WAIT, LONGEST_WAIT_ASKED = 0.5, 60.0, 600.0
"""Seconds before the second try; most seconds before a later one; most where the server says how long to wait."""
WITHOUT_ANSWER = 32
"""Number of prompts without an answer in a row after which the test prompt is sent."""
SILENCE = 300.0
"""Seconds without a reply, while requests fail, after which the test prompt is sent."""
TEST_PROMPT = "Say hello."
"""A prompt that every working chat model answers."""


class ConcurrencyLimit:
    """How many requests may be under way: it grows by an eighth a round, doubling at first, and shrinks to 0.7.

    A round is as many replies and failures as the limit allows requests, and at least `ROUND`. The limit shrinks where
    an eighth of a round is refused as too many requests, and stays where a sixteenth is. Other faults come whatever
    the load is, so only a third of a round shrinks it. A round whose replies take several times as long as those of
    the fastest keeps the limit: the server has a queue, and a longer one would only bring time-outs.
    """

    FIRST, ROUND, SHRINK, SLOWER = 4, 16, 0.7, 4.0
    SHARE_TOO_MANY, SHARE_ENOUGH, SHARE_OF_FAILURES = 1 / 8, 1 / 16, 1 / 3

    def __init__(self, most: int):
        self.most, self.value = most, min(self.FIRST, most)
        self._doubling, self._fastest = True, float("inf")
        self._busy, self._failures, self._seconds = 0, 0, []

    def count(self, seconds: float, failure: FailureKind | None = None) -> None:
        """Take note of a request that took `seconds`, and of how it failed if it did for the server's reasons."""
        if failure == "busy":
            self._busy += 1
        elif failure is not None:
            self._failures += 1
        else:
            self._seconds.append(seconds)
        size = self._busy + self._failures + len(self._seconds)
        if size < max(self.value, self.ROUND):
            return
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else float("inf")
        self._fastest = min(self._fastest, mean)
        is_too_many = self._busy > self.SHARE_TOO_MANY * size
        if is_too_many or self._busy + self._failures > self.SHARE_OF_FAILURES * size:
            self.value, self._doubling = max(int(self.value * self.SHRINK), 1), False
        elif self._busy <= self.SHARE_ENOUGH * size and mean <= self.SLOWER * self._fastest:
            step = self.value if self._doubling else max(self.value // 8, 1)
            self.value = min(self.value + step, self.most)
        self._busy, self._failures, self._seconds = 0, 0, []


@dataclasses.dataclass(order=True)
class _Request:
    due: float
    """When it is to be sent, on the monotonic clock."""
    prompt: str
    tries: int = 0


class Sender:
    """A back end that sends prompts one by one."""

    def __init__(self, name: str, ask: Ask, concurrency: int):
        """Take the model's name for messages, the function that asks it, and the most requests at a time."""
        self.name, self.ask, self.concurrency = name, ask, concurrency

    def __call__(
        self, prompts: Sequence[str], parameters: Parameters, allowance: Allowance
    ) -> Iterator[list[Reply]]:
        """See `Backend`."""
        yield from _Sending(self, prompts, parameters, allowance).replies()


class _Sending:
    """The state of one call of a Sender."""

    def __init__(self, sender: Sender, prompts: Sequence[str], parameters: Parameters, allowance: Allowance):
        self.sender, self.parameters, self.allowance = sender, parameters, allowance
        self.todo, self.waiting = deque(_Request(0.0, prompt) for prompt in prompts), []
        self.limit, self.under_way = ConcurrencyLimit(sender.concurrency), 0
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        self.doubtful: list[Reply] = []
        """Prompts that failed always, until an answer shows that the server works."""
        self.without_answer, self.answered = 0, False
        self.last_reply, self.broken = time.monotonic(), False
        """When the last reply came, and whether any request failed since for other reasons than too many requests."""
        self.error: BaseException | None = None

    def replies(self) -> Iterator[list[Reply]]:
        pool = ThreadPoolExecutor(self.sender.concurrency, thread_name_prefix=self.sender.name)
        try:
            while self._send(pool):
                if replies := [reply for outcome in self._outcomes() for reply in self._judge(*outcome)]:
                    yield replies
                if self.error is None and self._is_doubtful():
                    yield self._test()
            if self.doubtful and self.error is None and self.allowance.may_send(0):
                yield self._test()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self.error is not None:
            raise self.error

    def _send(self, pool: ThreadPoolExecutor) -> bool:
        """Send what is due and allowed; whether there is anything to wait for."""
        now = time.monotonic()
        while self.waiting and self.waiting[0].due <= now:
            self.todo.appendleft(heapq.heappop(self.waiting))
        while self.todo and self.under_way < self.limit.value and self.allowance.may_send(self.under_way):
            self.under_way += 1
            pool.submit(self._ask, self.todo.popleft())
        return self.under_way > 0 or bool(self.waiting and not self.todo)

    def _ask(self, request: _Request) -> None:
        start, result = time.monotonic(), None
        try:
            result = self.sender.ask(request.prompt, self.parameters)
        except BaseException as error:  # It is raised again where the outcome is judged.
            result = error
        self.outcomes.put((request, result, time.monotonic() - start))

    def _outcomes(self) -> list[tuple[_Request, Reply | BaseException, float]]:
        """Wait for an outcome, at most until something is due, and take what there is beside it."""
        seconds = max(self.waiting[0].due - time.monotonic(), 0.0) if self.waiting else None
        outcomes = []
        try:
            outcomes.append(self.outcomes.get(timeout=seconds))
            while True:
                outcomes.append(self.outcomes.get_nowait())
        except queue.Empty:
            pass
        except KeyboardInterrupt as error:
            if self.error is not None:
                raise
            # What is under way is paid for, so it is waited for; a second interrupt ends that too.
            self._stop(error)
        return outcomes

    def _judge(self, request: _Request, result: Reply | BaseException, seconds: float) -> list[Reply]:
        """What an outcome puts on record."""
        self.under_way -= 1
        if isinstance(result, Reply):
            self.limit.count(seconds)
            reply = dataclasses.replace(result, seconds=seconds)
            return [reply, *self._cleared()] if self._note(reply) else [reply]
        if not isinstance(result, Failure) or result.kind == "all":
            self._stop(asking_ends(self.sender.name, result))
            return []
        if result.kind != "prompt":
            self.limit.count(seconds, result.kind)
            self.broken = self.broken or result.kind != "busy"
        request.tries += 1
        at_first = result.kind in ("unreachable", "nonsense") and not self.answered
        tries = TRIES_AT_FIRST if at_first else TRIES[result.kind]
        if self.error is not None:
            pass
        elif request.tries < tries:
            request.due = time.monotonic() + waiting_time(request.tries, result.wait)
            heapq.heappush(self.waiting, request)
        else:
            self.doubtful.append(Reply(request.prompt, Answer("", str(result)), 0, 0))
            self.without_answer += 1
        return []

    def _note(self, reply: Reply) -> bool:
        """Take note of a reply; whether it has a text, which shows that the server works."""
        self.last_reply, self.broken = time.monotonic(), False
        if reply.answer.problem:
            self.without_answer += 1
            return False
        self.without_answer, self.answered = 0, True
        return True

    def _cleared(self) -> list[Reply]:
        replies, self.doubtful = self.doubtful, []
        return replies

    def _is_doubtful(self) -> bool:
        """Whether so much failed that the server may not work."""
        silent = self.broken and time.monotonic() - self.last_reply > SILENCE
        return silent or self.without_answer >= WITHOUT_ANSWER

    def _test(self) -> list[Reply]:
        """Send the test prompt: what failed is put on record if it is answered, and asking ends if it is not."""
        reply, problem = ask_test_prompt(self.sender.ask, self.parameters)
        if reply is not None and self._note(reply):
            return [reply, *self._cleared()]
        self._stop(asking_ends(self.sender.name, problem))
        return [] if reply is None else [reply]

    def _stop(self, error: BaseException) -> None:
        """Send nothing more, and raise the error when what is under way has arrived."""
        self.error = self.error or error
        self.todo.clear()
        self.waiting.clear()


def ask_test_prompt(ask: Ask, parameters: Parameters) -> tuple[Reply | None, str]:
    """The reply to the test prompt, if there is one, and why there is no answer; empty where there is one."""
    for tries in range(1, TRIES_AT_FIRST + 1):
        try:
            reply = ask(TEST_PROMPT, parameters)
        except Failure as error:
            problem = str(error)
            if error.kind in ("all", "prompt"):
                break
            if tries < TRIES_AT_FIRST:
                time.sleep(waiting_time(tries, error.wait))
        else:
            return reply, reply.answer.problem
    return None, problem


def asking_ends(name: str, reason: BaseException | str) -> BaseException:
    """What is raised where asking ends: reasons of the API with what can be done about them, others as they are."""
    if isinstance(reason, Failure | str):
        return RuntimeError(
            f"{name} gave no answer ({reason}); check the model's name, the key, the base URL in the environment and "
            "the limit of tokens. Answers so far are kept: the same command goes on from there"
        )
    return reason


def waiting_time(tries: int, asked: float) -> float:
    """Seconds to wait after a number of tries, at least those that were asked for; random, so that tries spread."""
    backoff = random.uniform(0.5, 1.0) * min(SHORTEST_WAIT * 2 ** (tries - 1), LONGEST_WAIT)
    return max(backoff, min(asked, LONGEST_WAIT_ASKED) * random.uniform(1.0, 1.2))
