"""Anthropic's message batches: thousands of prompts at half the price, answered within a day.

A batch is on record before it is sent, and its id as soon as there is one, so that a killed run finds its batches again
and pays for none twice. Where a run was killed before it learned the id, the batch is known by its time and size.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from nla_jax.chat.providers import AnthropicModel, failures
from nla_jax.chat.replies import Answer, Failure, Parameters, Reply
from nla_jax.chat.sending import TRIES, ask_test_prompt, asking_ends, waiting_time
from nla_jax.chat.store import AnswerStore

MOST_PROMPTS = 10_000
"""Most prompts of one batch; the API takes 100,000."""
MOST_CHARACTERS = 50_000_000
"""Most characters of one batch, instructions included; the API takes 256 MB."""
ROUNDS = 3
"""How often a prompt is sent in a batch that expires, or fails at it, before it counts as failing always."""
FIRST_POLL, LONGEST_POLL = 2.0, 60.0
"""Seconds until a batch is looked at for the first time; most seconds between two looks."""
_HERE_AND_THERE = 120.0
"""Seconds by which the clocks here and at the API may differ."""
T = TypeVar("T")


class MessageBatches:
    """A model that is asked in message batches."""

    def __init__(self, model: AnthropicModel):
        """Take the model with its client."""
        self.model, self.api = model, model.client.messages.batches

    def ask_all(
        self,
        prompts: Sequence[str],
        parameters: Parameters,
        store: AnswerStore,
        update: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Send prompts in batches, wait for the answers, and keep them; less is sent where the budget ends.

        Args:
          prompts: different prompts without an answer.
          parameters: the parameters of all of them.
          store: where answers and batches are kept.
          update: called with the number of prompts that were put on record.

        Raises:
          RuntimeError: the API refuses to work; what was sent is on record, and the same command goes on.
        """
        failed: dict[str, str] = {}
        for _ in range(ROUNDS):
            answered = store.find(prompts, parameters)
            left = [prompt for prompt in prompts if prompt not in answered]
            if not self.send(left, parameters, store):
                return
            failed = self.collect(left, parameters, store, update)
        replies = [Reply(prompt, Answer("", problem), 0, 0) for prompt, problem in failed.items()]
        store.keep(replies, parameters)
        update(len(replies))

    def send(self, prompts: Sequence[str], parameters: Parameters, store: AnswerStore) -> int:
        """Send prompts in batches, and wait for nothing; returns how many batches there are.

        Args:
          prompts: different prompts without an answer, which no batch under way holds; less is sent where the budget
            ends.
          parameters: the parameters of all of them.
          store: where batches are kept.

        Raises:
          RuntimeError: the API refuses to work; what was sent is on record.
        """
        parts = self._allowed(prompts, parameters, store)
        for part in parts:
            self._send(part, parameters, store)
        return len(parts)

    def collect(
        self,
        prompts: Sequence[str],
        parameters: Parameters,
        store: AnswerStore,
        update: Callable[[int], None] = lambda count: None,
    ) -> dict[str, str]:
        """Wait for the batches under way that hold any of the prompts, and keep what they answer.

        Args:
          prompts: the prompts.
          parameters: their parameters.
          store: where answers and batches are kept.
          update: called with the number of prompts that were put on record.

        Returns:
          Prompts that a batch did not come to, or at which the server failed, each with the reason.

        Raises:
          RuntimeError: no prompt of a batch was answered, and neither is the test prompt.
        """
        failed = {}
        for number in store.batches_of(prompts, parameters):
            if (name := self._name(number, store)) is not None:
                self._wait_for(name)
                failed |= self._keep(number, name, parameters, store, update)
            store.forget_batch(number)
        return failed

    def _allowed(self, prompts: Sequence[str], parameters: Parameters, store: AnswerStore) -> list[list[str]]:
        """The prompts that the budget allows, in parts that a batch takes."""
        parts, characters = [], MOST_CHARACTERS
        for count, prompt in enumerate(prompts, start=store.batched()):
            if not store.may_send(count, batch=True):
                break
            characters += len(prompt) + len(parameters.instruction)
            if characters > MOST_CHARACTERS or len(parts[-1]) == MOST_PROMPTS:
                parts.append([])
                characters = len(prompt) + len(parameters.instruction)
            parts[-1].append(prompt)
        return parts

    def _send(self, prompts: Sequence[str], parameters: Parameters, store: AnswerStore) -> None:
        number = store.remember_batch(prompts, parameters)
        requests = [
            {"custom_id": store.key(prompt, parameters), "params": self.model.body(prompt, parameters)}
            for prompt in prompts
        ]
        try:
            # What is not surely refused may have been taken, so it is not sent again before a look at the API's list.
            batch = self._call(lambda: self.api.create(requests=requests, timeout=600), again=("busy",))
        except RuntimeError as error:
            if error.__cause__.kind in ("all", "prompt", "busy", "unreachable"):
                store.forget_batch(number)
            raise
        store.name_batch(number, batch.id)

    def _name(self, number: int, store: AnswerStore) -> str | None:
        """The id of a batch; where the answer that told it was lost, that of a batch of its time and size."""
        name, sent, prompts = store.batch(number)
        if name is not None:
            return name
        known = store.batch_names()
        for batch in self._call(lambda: list(itertools.islice(self.api.list(limit=100), 1000))):
            if batch.created_at.timestamp() < sent - _HERE_AND_THERE:
                break
            counts = batch.request_counts
            size = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
            if size == len(prompts) and batch.id not in known:
                store.name_batch(number, batch.id)
                return batch.id
        return None

    def _wait_for(self, name: str) -> None:
        seconds = FIRST_POLL
        while self._call(lambda: self.api.retrieve(name)).processing_status != "ended":
            time.sleep(seconds)
            seconds = min(1.5 * seconds, LONGEST_POLL)

    def _keep(
        self,
        number: int,
        name: str,
        parameters: Parameters,
        store: AnswerStore,
        update: Callable[[int], None],
    ) -> dict[str, str]:
        """Keep what a batch that has ended answers; returns what it did not come to, as `collect` does."""
        _, _, prompts = store.batch(number)
        replies, failed = [], {}
        for item in self._call(lambda: list(self.api.results(name))):
            if (prompt := prompts.get(item.custom_id)) is None:
                continue  # The batch was taken for one of ours.
            reply = self._reply(prompt, item.result)
            if isinstance(reply, Reply):
                replies.append(reply)
            else:
                failed[prompt] = reply
        if not any(reply.answer.text for reply in replies):
            reply, problem = ask_test_prompt(self.model.ask, parameters)
            if problem:
                raise asking_ends(self.model.config.model, problem)
            replies.append(reply)
        store.keep(replies, parameters)
        update(sum(reply.prompt in prompts.values() for reply in replies))
        return failed

    def _reply(self, prompt: str, result: Any) -> Reply | str:
        """The reply in a batch's result, or why the prompt has to be sent again."""
        if result.type == "succeeded":
            return self.model.reply(prompt, result.message, batch=True)
        if result.type != "errored":
            return f"its message batch was {result.type} before it was answered"
        error = result.error.error
        if error.type == "invalid_request_error":
            return Reply(prompt, Answer("", error.message), 0, 0, batch=True)
        return f"{error.type}: {error.message}"

    def _call(
        self, call: Callable[[], T], again: Sequence[str] = ("busy", "server", "nonsense", "unreachable")
    ) -> T:
        """Call the API, again after failures of some kinds, and return what it returns.

        Raises:
          RuntimeError: it fails, because of the Failure that is its cause.
        """
        for tries in itertools.count(1):
            try:
                with failures(self.model.sdk):
                    return call()
            except Failure as error:
                if error.kind not in again or tries >= TRIES[error.kind]:
                    raise asking_ends(self.model.config.model, error) from error
                time.sleep(waiting_time(tries, error.wait))
        raise AssertionError("counting does not end")
