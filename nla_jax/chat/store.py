"""The answers of chat models in an SQLite file, with what they took, and the message batches that are under way."""

import contextlib
import dataclasses
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from nla_jax.chat.prices import Price, guessed_tokens, price_of
from nla_jax.chat.replies import Answer, Parameters, Reply

_VERSION = 2
"""Version of the tables; version 1 had the table `answers` alone, without instructions, problems and tokens."""
_TABLES = (
    "create table if not exists answers (key text primary key, model text, instruction text, parameters text, "
    "prompt text, answer text, problem text, input_tokens integer, output_tokens integer, seconds real)",
    # Instructions are long and the same for many answers, which name them by digest.
    "create table if not exists instructions (digest text primary key, instruction text)",
    # What was paid for, also where the answer was asked for again later.
    "create table if not exists spending (model text, batch integer, answers integer, input_tokens integer, "
    "output_tokens integer, primary key (model, batch))",
    # A batch without an id is about to be sent.
    "create table if not exists batches (number integer primary key, id text, model text, instruction text, "
    "parameters text, sent real)",
    "create table if not exists batch_prompts (batch integer, key text, prompt text, primary key (batch, key))",
    "create index if not exists batch_prompts_by_key on batch_prompts (key)",
)
_AT_A_TIME = 500
"""Keys that one query looks up."""


class BudgetSpent(RuntimeError):
    """The budget does not allow another request."""


@dataclasses.dataclass
class AnswerStore:
    """The answers of one chat model in an open file, and the account of what was spent in that file."""

    db: sqlite3.Connection
    model: str
    prices: Mapping[str, Price]
    budget: float | None = None
    changed: Callable[[], None] = lambda: None
    """Called after every change on disk."""
    guess: float = 0.0
    """US dollars that an answer is taken to cost as long as there is none."""

    def find(self, prompts: Sequence[str], parameters: Parameters) -> dict[str, Answer]:
        """Prompt -> its answer, for those prompts that are on record."""
        keys = [self.key(prompt, parameters) for prompt in prompts]
        answers = {}
        for start in range(0, len(keys), _AT_A_TIME):
            some = keys[start : start + _AT_A_TIME]
            query = f"select prompt, answer, problem from answers where key in ({','.join('?' * len(some))})"
            answers |= {
                prompt: Answer(text, problem) for prompt, text, problem in self.db.execute(query, some)
            }
        return answers

    def keep(self, replies: Iterable[Reply], parameters: Parameters) -> None:
        """Put replies on record, with what they took; they are on disk when this returns."""
        digest = _digest(parameters.instruction)
        with self.db:
            self.db.execute(
                "insert or ignore into instructions values (?, ?)", (digest, parameters.instruction)
            )
            for reply in replies:
                self._keep(reply, self.key(reply.prompt, parameters), digest, parameters)
        self.changed()

    def _keep(self, reply: Reply, key: str, digest: str, parameters: Parameters) -> None:
        answer, tokens = reply.answer, (reply.input_tokens, reply.output_tokens)
        row = (
            key,
            self.model,
            digest,
            parameters.key,
            reply.prompt,
            answer.text,
            answer.problem,
            *tokens,
            reply.seconds,
        )
        self.db.execute(f"insert or replace into answers values ({','.join('?' * len(row))})", row)
        # Where the provider names no tokens, they are guessed from the texts.
        guessed = guessed_tokens([reply.prompt, parameters.instruction]), guessed_tokens([answer.text])
        paid = [guess if count is None else count for count, guess in zip(tokens, guessed, strict=True)]
        self.db.execute(
            "insert into spending values (?, ?, 1, ?, ?) on conflict do update set answers = answers + 1, "
            "input_tokens = input_tokens + excluded.input_tokens, "
            "output_tokens = output_tokens + excluded.output_tokens",
            (self.model, reply.batch, *paid),
        )

    def forget_problems(self, prompts: Sequence[str], parameters: Parameters) -> None:
        """Drop what is on record without an answer, so that it is asked again; what it cost stays on the account."""
        keys = [
            self.key(prompt, parameters)
            for prompt, answer in self.find(prompts, parameters).items()
            if answer.problem
        ]
        with self.db:
            self.db.executemany("delete from answers where key = ?", [(key,) for key in keys])
        self.changed()

    def key(self, prompt: str, parameters: Parameters) -> str:
        """What an answer is found by: a hash of the model, the instruction, the parameters and the prompt."""
        return _key(self.model, _digest(parameters.instruction), parameters.key, prompt)

    def remember_batch(self, prompts: Sequence[str], parameters: Parameters) -> int:
        """Put a message batch that is about to be sent on record; returns the number under which it is."""
        digest = _digest(parameters.instruction)
        with self.db:
            self.db.execute(
                "insert or ignore into instructions values (?, ?)", (digest, parameters.instruction)
            )
            row = (self.model, digest, parameters.key, time.time())
            number = self.db.execute("insert into batches values (null, null, ?, ?, ?, ?)", row).lastrowid
            rows = [(number, self.key(prompt, parameters), prompt) for prompt in prompts]
            self.db.executemany("insert into batch_prompts values (?, ?, ?)", rows)
        self.changed()
        return number

    def name_batch(self, number: int, name: str) -> None:
        """Put the id on record that the provider gave a batch."""
        with self.db:
            self.db.execute("update batches set id = ? where number = ?", (name, number))
        self.changed()

    def forget_batch(self, number: int) -> None:
        """Drop a batch that was never sent, or whose answers are on record."""
        with self.db:
            self.db.execute("delete from batches where number = ?", (number,))
            self.db.execute("delete from batch_prompts where batch = ?", (number,))
        self.changed()

    def batches_of(self, prompts: Sequence[str], parameters: Parameters) -> list[int]:
        """Numbers of the batches under way that hold any of these prompts."""
        numbers = {number for (number,) in self.db.execute("select number from batches")}
        if not numbers:
            return []
        keys, found = [self.key(prompt, parameters) for prompt in prompts], set()
        for start in range(0, len(keys), _AT_A_TIME):
            some = keys[start : start + _AT_A_TIME]
            query = f"select distinct batch from batch_prompts where key in ({','.join('?' * len(some))})"
            found |= {number for (number,) in self.db.execute(query, some)}
        return sorted(found & numbers)

    def in_batches(self, prompts: Sequence[str], parameters: Parameters) -> set[str]:
        """Those of the prompts that a batch under way holds."""
        key_of = {self.key(prompt, parameters): prompt for prompt in prompts}
        keys, sent = list(key_of), set()
        for start in range(0, len(keys), _AT_A_TIME):
            some = keys[start : start + _AT_A_TIME]
            query = f"select key from batch_prompts where key in ({','.join('?' * len(some))})"
            sent |= {key_of[key] for (key,) in self.db.execute(query, some)}
        return sent

    def batched(self) -> int:
        """How many prompts the batches under way hold."""
        return self.db.execute("select count(*) from batch_prompts").fetchone()[0]

    def batch(self, number: int) -> tuple[str | None, float, dict[str, str]]:
        """The id of a batch, if the provider gave one, when it was sent (Unix time), and key -> prompt."""
        query = "select id, sent from batches where number = ?"
        name, sent = self.db.execute(query, (number,)).fetchone()
        query = "select key, prompt from batch_prompts where batch = ?"
        return name, sent, dict(self.db.execute(query, (number,)).fetchall())

    def batch_names(self) -> set[str]:
        """The ids of all batches under way."""
        return {name for (name,) in self.db.execute("select id from batches where id is not null")}

    def spent(self) -> float:
        """US dollars that all answers of the file took, at today's prices; models without a price count as free."""
        total = 0.0
        for model, batch, reading, writing in self.db.execute(
            "select model, batch, input_tokens, output_tokens from spending"
        ):
            if (price := price_of(model, self.prices)) is not None:
                total += price.dollars(reading, writing, batch=bool(batch))
        return total

    def usual(self, batch: bool = False) -> float | None:
        """US dollars that an answer of this model took on average; None where there is none yet, or no price."""
        query = "select answers, input_tokens, output_tokens from spending where model = ? and batch = ?"
        row = self.db.execute(query, (self.model, batch)).fetchone()
        price = price_of(self.model, self.prices)
        return price.dollars(row[1], row[2], batch=batch) / row[0] if row and price else None

    def may_send(self, under_way: int, batch: bool = False) -> bool:
        """Whether the budget allows another request while `under_way` are waited for, which take what is usual."""
        if self.budget is None:
            return True
        usual = self.usual(batch)
        return self.spent() + under_way * (self.guess if usual is None else usual) < self.budget

    def seconds(self) -> float | None:
        """Seconds from a request to its reply, on average over this model's answers; None where there are none."""
        query = "select avg(seconds) from answers where model = ? and seconds is not null and problem = ''"
        return self.db.execute(query, (self.model,)).fetchone()[0]


@contextlib.contextmanager
def open_store(
    file: Path,
    model: str,
    *,
    prices: Mapping[str, Price],
    budget: float | None = None,
    changed: Callable[[], None] = lambda: None,
) -> Iterator[AnswerStore]:
    """The store in a file, which is made if need be; a file of an earlier version keeps its answers.

    Raises:
      ValueError: the file is not a store of answers, or is of a later version.
      OSError: the disk is full, the file may not be written to, or another process holds it; also raised later on.
    """
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as db:
            _prepare(db, file)
            yield AnswerStore(db, model, prices, budget, changed)
    except sqlite3.OperationalError as error:
        raise OSError(
            f"answers of {model} cannot be kept in {file}: {error}; make room on the disk, see whether the file may be "
            "written to, and who else uses it. Answers so far are kept: the same command goes on from there"
        ) from error
    except sqlite3.DatabaseError as error:
        raise ValueError(
            f"{file} is not a file with answers of chat models ({error}); name another"
        ) from error


def _prepare(db: sqlite3.Connection, file: Path) -> None:
    if (version := _version(db)) == _VERSION:
        return
    if version > _VERSION:
        raise ValueError(
            f"{file} was written by a later version of nla_jax (its tables have version {version}, this one knows "
            f"{_VERSION}); update nla_jax, or name another file"
        )
    with db:
        db.execute("begin immediate")
        if _version(db) == _VERSION:
            return  # Another process was faster.
        earlier = db.execute("select 1 from sqlite_master where name = 'answers'").fetchone() is not None
        if earlier:
            db.execute("alter table answers rename to earlier_answers")
        for table in _TABLES:
            db.execute(table)
        if earlier:
            _take_over(db)
        db.execute(f"pragma user_version = {_VERSION}")


def _version(db: sqlite3.Connection) -> int:
    return db.execute("pragma user_version").fetchone()[0]


def _take_over(db: sqlite3.Connection) -> None:
    """Bring the answers of version 1 into the tables of today; what they cost is not known."""
    nothing = _digest("")
    db.execute("insert into instructions values (?, '')", (nothing,))
    rows = db.execute("select model, max_tokens, prompt, answer from earlier_answers")
    for model, max_tokens, prompt, answer in rows.fetchall():
        parameters = Parameters(max_tokens).key
        key = _key(model, nothing, parameters, prompt)
        row = (key, model, nothing, parameters, prompt, answer, "")
        db.execute("insert into answers values (?, ?, ?, ?, ?, ?, ?, null, null, null)", row)
    db.execute("drop table earlier_answers")


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _key(model: str, instruction: str, parameters: str, prompt: str) -> str:
    return _digest("\0".join((model, instruction, parameters, prompt)))
