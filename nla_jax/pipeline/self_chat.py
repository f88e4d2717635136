"""Documents that the target LM writes itself: answers to given prompts, sampled in blocks that are kept on disk.

A block is the unit of everything: its chats are one batch of one shape, each sampled by a key of its own, and its file
is written whole. So a run that was killed writes the same chats as one that was not, and loses one block at most.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

from nla_jax.chat.local import LocalLM, seed_of
from nla_jax.config import plain
from nla_jax.data.corpora.chats import Message, render_plain
from nla_jax.data.corpora.documents import Document
from nla_jax.data.corpora.self_prompts import ChatPrompt, SelfChatConfig, self_prompts
from nla_jax.files import AnyPath, write_text
from nla_jax.lm.chat_template import render_messages
from nla_jax.lm.files.weights import load_language_model
from nla_jax.lm.prompt_batches import PROMPT_LENGTHS, filled, rounded_up
from nla_jax.lm.tokenized import as_unicode
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.sharding.placement import wait_for_all
from nla_jax.text_analysis import repeated_ngrams, share

FOLDER = "data/self_chat"
"""Folder of the chats in a run directory; each choice of prompts, model and sampling has a folder of its own in it."""
_MOST_REPEATED = 0.5
"""Share of an answer's runs of four words that may have stood in it before."""


@dataclasses.dataclass
class _Chat:
    """A chat while it is written."""

    messages: list[Message]
    problem: str = ""
    """Why it was not continued; empty where all its turns are answered."""
    is_done: bool = False


def self_documents(run: Run, source: str) -> Iterator[Document]:
    """Yield the chats of a source self:PROMPTS: the user's turns as they are given, the answers as the LM samples them.

    A chat ends before an answer that is empty or repeats itself, after one that is cut, and where the context of the
    model is full; without any good answer it is left out. One warning counts these. All processes of a run call this
    together. What was written stays in `data/self_chat` of the run directory and is not written again.

    Raises:
      FileNotFoundError, ValueError: no such prompts, see `self_prompts`, or a model without a chat template.
    """
    config = run.config.corpus.self_chat
    prompts = self_prompts(source, config, run.config.seed)
    blocks = [prompts[i : i + config.batch_size] for i in range(0, len(prompts), config.batch_size)]
    folder = run.directory / FOLDER / _digest(run, prompts)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05d}.jsonl" for number in range(len(blocks))]
    is_there = [file.exists() for file in files]
    # No process writes a block before all have seen which ones are there.
    wait_for_all("self-chat")
    writer = None
    problems: Counter[str] = Counter()
    quiet = jax.process_index() > 0
    with tqdm(total=len(prompts), desc="self-chat", unit="chat", dynamic_ncols=True, disable=quiet) as bar:
        for block, file, written in zip(blocks, files, is_there, strict=True):
            if written:
                rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            else:
                writer = writer or _writer(run)
                rows = _write_block(writer, block, config, run.config.seed)
                _save(file, rows)
            bar.update(len(block))
            for row in rows:
                problems[row["problem"]] += bool(row["problem"])
                if any(message["role"] == "assistant" for message in row["messages"]):
                    messages = tuple(row["messages"])
                    yield Document(row["id"], render_plain(messages), "chat", messages)
                else:
                    problems["chats without any answer, left out"] += 1
    if told := "; ".join(f"{problem}: {count}" for problem, count in problems.items() if count):
        warn(f"{source}: of {len(prompts)} chats some ended early. {told}")


def _digest(run: Run, prompts: Sequence[ChatPrompt]) -> str:
    """Identifies everything that decides what is written."""
    model = run.config.model
    fields = [run.config.seed, model.path, model.dtype, plain(run.config.corpus.self_chat)]
    text = json.dumps([*fields, [prompt.id for prompt in prompts]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _writer(run: Run) -> LocalLM:
    """The model that answers.

    Raises:
      ValueError: it has no chat template.
    """
    other, model = run.config.corpus.self_chat.model, run.config.model
    if other:
        lm = load_language_model(other, mesh=run.mesh, dtype=model.dtype)
        config = dataclasses.replace(lm.config, dtype=model.dtype, attention_dtype=model.attention_dtype)
    else:
        lm, config = run.models.target, run.models.lm_config
    if lm.tokenizer.chat_template is None:
        raise ValueError(
            f"the model {lm.name} has no chat template, so it cannot write the chats of {run.config.corpus.source}; "
            "name an instruction-tuned model with corpus.self_chat.model, or take another corpus"
        )
    return LocalLM(lm, config)


def _write_block(
    writer: LocalLM, prompts: Sequence[ChatPrompt], config: SelfChatConfig, seed: int
) -> list[dict[str, Any]]:
    """The chats of one block as rows: `id`, `messages`, and as `problem` why a chat ended early."""
    chats = [_Chat(_opening(writer, prompt)) for prompt in prompts]
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked: dict[int, list[int]] = {}
        for index, (chat, prompt) in enumerate(zip(chats, prompts, strict=True)):
            if chat.is_done or turn == len(prompt.turns):
                chat.is_done = True
                continue
            if turn:
                chat.messages.append({"role": "user", "content": prompt.turns[turn]})
            ids = _encode(writer, chat.messages)
            if len(ids) + config.max_tokens > min(writer.config.max_positions, PROMPT_LENGTHS[-1]):
                _end(chat, "turns for which the context is too short")
            else:
                asked[index] = ids
        if not asked:
            break
        # Always as many rows: what is written in one does not depend on how many others go on.
        rows = filled(list(asked), config.batch_size)
        answers = writer.write(
            [asked[index] for index in rows],
            length=rounded_up(max(map(len, asked.values())), PROMPT_LENGTHS),
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seeds=[seed_of(f"{seed} {prompts[index].id} {turn}") for index in rows],
        )
        for index, (answer, is_ended) in zip(asked, answers, strict=False):
            _take(chats[index], as_unicode(answer), is_ended)
    return [
        {"id": prompt.id, "messages": chat.messages, "problem": chat.problem}
        for prompt, chat in zip(prompts, chats, strict=True)
    ]


def _take(chat: _Chat, answer: str, is_ended: bool) -> None:
    """Add an answer to a chat, or end the chat before it."""
    if not answer:
        _end(chat, "empty answers")
    elif (share([repeated_ngrams(answer, 4)]) or 0.0) > _MOST_REPEATED:
        _end(chat, "answers that repeat themselves")
    else:
        chat.messages.append({"role": "assistant", "content": answer})
        if not is_ended:
            chat.problem, chat.is_done = "answers that were cut", True


def _end(chat: _Chat, problem: str) -> None:
    """End a chat before the user's turn that stands last in it."""
    chat.messages.pop()
    chat.problem, chat.is_done = problem, True


def _opening(writer: LocalLM, prompt: ChatPrompt) -> list[Message]:
    """The system prompt and the first user turn, as one message where the chat template takes no system prompt."""
    user: Message = {"role": "user", "content": prompt.turns[0]}
    if not prompt.system:
        return [user]
    messages = [{"role": "system", "content": prompt.system}, user]
    try:
        if prompt.system in render_messages(writer.lm.tokenizer, messages, add_generation_prompt=True):
            return messages
    except ValueError:
        pass  # The template refuses system prompts.
    return [{"role": "user", "content": f"{prompt.system}\n\n{prompt.turns[0]}"}]


def _encode(writer: LocalLM, messages: Sequence[Message]) -> list[int]:
    text = render_messages(writer.lm.tokenizer, messages, add_generation_prompt=True)
    return writer.lm.tokenizer.encode(text, add_special_tokens=False)


def _save(file: AnyPath, rows: Sequence[dict[str, Any]]) -> None:
    """Write a block, whole or not at all; of several processes the first does."""
    if jax.process_index() == 0:
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
