import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.config import CorpusConfig, ExperimentConfig, ModelConfig
from nla_jax.data.extraction import ExtractionConfig
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.pipeline import oracle
from nla_jax.pipeline.explain import explain
from nla_jax.pipeline.extract import extract
from nla_jax.pipeline.run import Run
from nla_jax.training.answers import AnswerBatch, answer_log_probs

THINGS = ("ships", "bread", "music", "stones", "horses", "letters")


@pytest.fixture(scope="module")
def run(shallow_model_dir, tmp_path_factory):
    """A run on 60 short documents about one thing each, that has its data and a trained oracle."""
    directory = tmp_path_factory.mktemp("asked")
    lines = [
        json.dumps(
            {"id": f"doc {i}", "text": f"Here {i} " + f"they spoke of {THINGS[i % 6]} and " * 9, "genre": "g"}
        )
        for i in range(60)
    ]
    (directory / "corpus.jsonl").write_text("\n".join(lines))
    corpus = CorpusConfig(str(directory / "corpus.jsonl"), av_sft=0.6, ar_sft=0.1, rl=0.1, held_out=0.2)
    extraction = ExtractionConfig(max_tokens=40, min_position=20, positions_per_document=2, length_buckets=1)
    evaluation = EvaluationConfig(oracle_steps=24, oracle_batch_size=8, batch_size=8, monitor_rows=8)
    config = ExperimentConfig(
        "asked",
        model=ModelConfig(str(shallow_model_dir), layer=1),
        corpus=corpus,
        extraction=extraction,
        evaluation=evaluation,
    )
    made = Run(config, directory / "run")
    extract(made)
    explain(made)
    assert not oracle.oracle_is_trained(made)
    oracle.train_oracle(made)
    return made


def test_it_learns_answers_and_is_kept(run):
    assert oracle.oracle_is_trained(run)
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["held_out_loss"] for row in rows if row["stage"] == "oracle" and "held_out_loss" in row]
    assert losses[-1] < losses[0] - 0.3
    (folder,) = (run.directory / "checkpoints").iterdir()
    assert folder.name == "oracle_24"
    # The run's own AV is another model, of which nothing is there.
    assert run.checkpoints("av_sft").latest() is None
    longer = dataclasses.replace(run.config.evaluation, oracle_steps=80)
    assert not oracle.oracle_is_trained(
        Run(dataclasses.replace(run.config, evaluation=longer), run.directory)
    )


def test_a_question_stands_before_its_answer_and_what_closes_it(run):
    codec = oracle.RunOracle(run).codec
    ids, lengths, question_lengths = oracle.encode_asked(codec, ["Why?"], ["So it is."])
    decode, closing = codec.tokenizer.decode, codec.verbalizer.prompt.closing
    assert decode(ids[0, : question_lengths[0]]) == "Question: Why?\nAnswer:"
    assert decode(ids[0, question_lengths[0] : lengths[0]]) == " So it is." + decode(list(closing))
    assert not ids[0, lengths[0] :].any()
    # A question that is too long leaves no answer.
    ids, lengths, question_lengths = oracle.encode_asked(codec, ["why " * 99], ["So."])
    assert lengths[0] == question_lengths[0] == oracle.MOST_TOKENS


def test_only_answers_count(run):
    asked = oracle.RunOracle(run)
    ids, lengths, question_lengths = oracle.encode_asked(
        asked.codec, ["Why?", "Who is it?"], ["So.", "He is."]
    )
    h = run.held_out(2).activations
    batch = AnswerBatch(*map(jnp.asarray, (h, ids, lengths, question_lengths)))
    verbalizer = asked.codec.verbalizer
    found = jax.jit(functools.partial(answer_log_probs, verbalizer))(asked.params, batch)
    each = jax.jit(verbalizer.statistics)(asked.params, *map(jnp.asarray, (h, ids, lengths))).log_prob
    expected = [each[i, question_lengths[i] : lengths[i]].sum() for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_scores_are_over_those_of_the_mean_activation(run):
    asked = oracle.RunOracle(run)
    h = np.concatenate([run.held_out(3).activations, run.yardstick.mean_D[None]])
    options = ["About ships.", "About bread and music."]
    scores = asked.scores(h, "What is it about?", options)
    assert scores.shape == (4, 2) and np.abs(scores[:3]).max() > 1e-3
    np.testing.assert_allclose(scores[3], 0, atol=1e-4)


def test_answers_are_sampled_after_the_question(run):
    asked = oracle.RunOracle(run)
    answers = asked.answers(run.held_out(5).activations, "What is it about?")
    assert len(answers) == 5 and all(answer is None or answer.strip() for answer in answers)
    assert asked.answers(run.held_out(5).activations, "What is it about?") == answers


def test_the_models_are_adapters_of_the_target(run):
    asked = oracle.oracle_run(run)
    assert asked.config.lora.rank == oracle.RANK and run.config.lora.rank == 0
    trained = asked.models.trainable_params("oracle", "av")
    leaves = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    assert leaves and all("lora" in leaf for leaf in leaves)
