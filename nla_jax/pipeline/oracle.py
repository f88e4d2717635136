"""The activation oracle of a run: adapters of the target that learn to answer questions about the AV's training rows.

It is trained as the AV's warm start is, with another prompt: the same injection, and questions with their answers in
place of explanations. Its checkpoints lie beside those of the run.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import INJECTION_SLOT, PromptTemplates
from nla_jax.autoencoder.round_trip import RoundTrip
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.config import WarmStartConfig
from nla_jax.data.batches import Rows, evaluation_batches
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.splits import some_rows
from nla_jax.data.writers.descriptive import DescriptiveConfig, DescriptiveWriter
from nla_jax.data.writers.word_counts import WordCounts
from nla_jax.evaluation.oracle import answered_questions
from nla_jax.lm.prompt_batches import pad
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.warm_starts import WarmStart
from nla_jax.process import progress_bar
from nla_jax.randomness import key_for
from nla_jax.sharding.placement import shard_batch, to_host
from nla_jax.training.answers import AnswerBatch, answer_log_probs, answer_step
from nla_jax.training.loop import Best, LoopConfig
from nla_jax.training.state import OptimizerConfig
from nla_jax.training.supervised import jit_step

TEMPLATE = (
    "A vector was read from a language model at the end of some text. Answer questions about the text. "
    f"Vector: {INJECTION_SLOT}"
)
RANK = 16
"""Rank of the adapters, where the run trains none itself."""
LEARNING_RATE = 1e-3
MOST_TOKENS = 64
"""Most tokens of a question with its answer; longer answers are cut."""
TRAINING_ROWS = 32_768
"""Most rows that questions are asked about."""


def oracle_run(run: Run) -> Run:
    """The same run with the oracle in place of its AV: another prompt, adapters, and the AV's warm start as its own."""
    config, evaluation = run.config, run.config.evaluation
    steps = evaluation.oracle_steps
    templates = PromptTemplates(
        verbalizer=TEMPLATE,
        forced_start="",
        closing=config.templates.closing,
        reconstructor=config.templates.reconstructor,
        marker=config.templates.marker,
        chat=config.templates.chat,
    )
    warm_start = WarmStartConfig(
        LoopConfig(steps, evaluate_every=max(steps // 4, 1), checkpoint_every=max(steps // 2, 1)),
        batch_size=evaluation.oracle_batch_size,
        length_buckets=2,
        optimizer=OptimizerConfig(
            LEARNING_RATE, warmup_steps=min(10, steps), decay_steps=max(steps, min(10, steps))
        ),
    )
    lora = dataclasses.replace(config.lora, rank=config.lora.rank or RANK)
    asked = dataclasses.replace(
        config, templates=templates, lora=lora, av_sft=warm_start, max_explanation_tokens=MOST_TOKENS
    )
    return Run(asked, run.directory, mesh=run.mesh)


def oracle_is_trained(run: Run) -> bool:
    """Whether its checkpoint is there."""
    return (oracle_run(run).checkpoints("oracle").latest() or 0) >= run.config.evaluation.oracle_steps


def train_oracle(run: Run) -> None:
    """Train the oracle, going on from its last checkpoint if there is one; its best step by held-out answers is kept.

    Raises:
      ValueError: rows without contexts, or too few questions for a batch.
    """
    asked, seed = oracle_run(run), run.config.seed
    config, codec = asked.config.av_sft, asked.models.autoencoder
    verbalizer, optimizer = codec.verbalizer, config.optimizer.build()
    training = some_rows(run.open("av_sft"), TRAINING_ROWS, seed).read()
    writer = DescriptiveWriter(DescriptiveConfig(), seed=seed, words=WordCounts(training.contexts or ()))
    rows = _encoded(codec, training, writer)
    monitor = _encoded(codec, run.monitored(run.config.evaluation.monitor_rows), writer)
    held_out = monitor.batch(np.arange(len(monitor)))
    log_probs = jax.jit(functools.partial(answer_log_probs, verbalizer))

    def evaluate(states: Any, highest: Any, steps_made: int) -> dict[str, float]:
        params, total = asked.models.with_base("av", states["av"].params), 0.0
        for batch, real in evaluation_batches(held_out, run.config.evaluation.batch_size):
            placed = AnswerBatch(**shard_batch(batch, run.mesh))
            total += float(to_host(log_probs(params, placed))[:real].sum())
        tokens = held_out["lengths_B"] - held_out["question_lengths_B"]
        return {"held_out_loss": -total / float(tokens.sum())}

    WarmStart(
        run=asked,
        stage="oracle",
        model="av",
        config=config,
        optimizer=optimizer,
        step=jit_step(
            answer_step, verbalizer=verbalizer, optimizer=optimizer, micro_batches=config.micro_batches
        ),
        batch_type=AnswerBatch,
        rows=rows,
        max_length=MOST_TOKENS,
        forward_flops=functools.partial(
            verbalizer.forward_flops, activations=config.batch_size, answers=config.batch_size
        ),
        evaluate=evaluate,
        best=Best("held_out_loss", lowest=True),
        shown=("loss", "held_out_loss"),
        seed=seed,
    ).train()


@dataclasses.dataclass(frozen=True, eq=False)
class AskedRows:
    """A `RowSource` of questions with their answers about rows in memory."""

    data: ActivationDataset
    row_N: Int[np.ndarray, "N"]
    """The row that each question is about."""
    responses_NT: Int[np.ndarray, "N T"]
    lengths_N: Int[np.ndarray, "N"]
    question_lengths_N: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.row_N)

    def chunk_sizes(self) -> Int[np.ndarray, "G"]:
        """See `RowSource`."""
        return np.array([len(self)])

    def batch(self, index_B: Int[np.ndarray, "B"]) -> Rows:
        """Columns of an `AnswerBatch`."""
        return {
            "activations_BD": self.data.activations[self.row_N[index_B]],
            "responses_BT": self.responses_NT[index_B],
            "lengths_B": self.lengths_N[index_B],
            "question_lengths_B": self.question_lengths_N[index_B],
        }


def _encoded(codec: Autoencoder, data: ActivationDataset, writer: DescriptiveWriter) -> AskedRows:
    found = answered_questions(data, writer)
    questions, answers = [question for _, question, _ in found], [answer for _, _, answer in found]
    return AskedRows(
        data, np.array([row for row, _, _ in found], int), *encode_asked(codec, questions, answers)
    )


def encode_asked(
    codec: Autoencoder, questions: Sequence[str], answers: Sequence[str]
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
    """Questions with their answers and what closes them: ids padded to `MOST_TOKENS`, lengths, lengths of questions."""
    closing = codec.verbalizer.prompt.closing
    asked = [question_ids(codec, question) for question in questions]
    told = [codec.tokenizer.encode(f" {answer}", add_special_tokens=False) for answer in answers]
    rows = [[*ask, *tell, *closing][:MOST_TOKENS] for ask, tell in zip(asked, told, strict=True)]
    ids_NT, lengths_N = pad(rows, MOST_TOKENS)
    question_lengths_N = np.minimum([len(ask) for ask in asked], MOST_TOKENS).astype(lengths_N.dtype)
    return ids_NT, lengths_N, question_lengths_N


def question_ids(codec: Autoencoder, question: str) -> list[int]:
    """The tokens that stand between the prompt and an answer."""
    return codec.tokenizer.encode(f"Question: {question}\nAnswer:", add_special_tokens=False)


class RunOracle:
    """The trained oracle of a run as an `Oracle`, its weights read when they are first needed."""

    def __init__(self, run: Run):
        """Remember where the weights are."""
        self.run, self.mean_D = oracle_run(run), run.yardstick.mean_D
        self.codec = self.run.models.autoencoder
        self._log_probs = jax.jit(functools.partial(answer_log_probs, self.codec.verbalizer))

    @functools.cached_property
    def params(self) -> Any:
        """The whole parameters of the best step."""
        return self.run.models.model_params("oracle", "av")

    def scores(
        self, activations_ND: np.ndarray, question: str, options: Sequence[str], desc: str | None = None
    ) -> Float[np.ndarray, "N G"]:
        """See `evaluation.subject.Oracle`."""
        N, G = len(activations_ND), len(options)
        of_mean_1G = self._scored(self.mean_D[None], question, options, None)
        return self._scored(activations_ND, question, options, desc).reshape(N, G) - of_mean_1G

    def _scored(
        self, activations_ND: np.ndarray, question: str, options: Sequence[str], desc: str | None
    ) -> Float[np.ndarray, "N G"]:
        """The log-probability of each option about each activation."""
        N, G, size = len(activations_ND), len(options), self.run.config.evaluation.batch_size
        ids_GT, lengths_G, question_lengths_G = encode_asked(self.codec, [question] * G, options)
        columns = {
            "activations_BD": np.repeat(activations_ND, G, axis=0),
            "responses_BT": np.tile(ids_GT, (N, 1)),
            "lengths_B": np.tile(lengths_G, N),
            "question_lengths_B": np.tile(question_lengths_G, N),
        }
        found = []
        with progress_bar(desc, N * G, "answer") as bar:
            for batch, real in evaluation_batches(columns, size):
                placed = AnswerBatch(**shard_batch(batch, self.run.mesh))
                found.append(to_host(self._log_probs(self.params, placed))[:real])
                bar.update(real)
        return np.concatenate(found).reshape(N, G)

    def answers(self, activations_ND: np.ndarray, question: str, desc: str | None = None) -> list[str | None]:
        """See `evaluation.subject.Oracle`."""
        verbalizer, config = self.codec.verbalizer, self.run.config
        tail = (*verbalizer.prompt.tail, *question_ids(self.codec, question))
        asking = dataclasses.replace(verbalizer, prompt=dataclasses.replace(verbalizer.prompt, tail=tail))
        codec = dataclasses.replace(
            self.codec, verbalizer=asking, max_explanation_tokens=_answer_tokens(asking)
        )
        reader = RoundTrip(codec, self.run.mesh, config.evaluation.batch_size)
        return reader.verbalize(self.params, activations_ND, key_for(config.seed, "oracle"), 0.0, desc)


def _answer_tokens(verbalizer: Verbalizer) -> int:
    """Most tokens of a sampled answer with its closing."""
    return MOST_TOKENS // 2 + len(verbalizer.prompt.closing)
