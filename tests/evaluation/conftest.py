"""An NLA without training: real activations of the tiny model, rules for AV and AR."""

import dataclasses
import functools

import numpy as np
import pytest

from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.data.dataset import ActivationDataset
from nla_jax.data.sidecar import CorpusSlice, Extraction, Sidecar
from nla_jax.evaluation.baselines import ridge_from_words
from nla_jax.evaluation.config import EvaluationConfig
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.target_lm import TargetLM
from nla_jax.lm.transformer import stack_blocks

LAYER = 2
TOPICS = ("ships", "bread", "music", "stones", "horses", "letters", "gardens", "clocks", "rivers", "lamps")
PLACES = ("harbor", "kitchen", "theater", "quarry", "stable", "office", "park", "tower", "valley", "street")
PEOPLE = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")


def document(index: int) -> str:
    rng = np.random.default_rng([7, index])

    def of(words):
        return words[rng.integers(len(words))]

    sentences = [
        f"In the {of(PLACES)} {of(PEOPLE)} told a story about {of(TOPICS)} and {of(TOPICS)} to {of(PEOPLE)}."
        for _ in range(6)
    ]
    return " ".join(sentences)


def rows(target: TargetLM, documents: range, seed: int) -> ActivationDataset:
    """Two positions a document, with what the built-in explainer would write."""
    rng, contexts, after, docs = np.random.default_rng(seed), [], [], []
    for index in documents:
        words = document(index).split()
        for cut in sorted(rng.choice(np.arange(30, len(words) - 10), size=2, replace=False)):
            contexts.append(" ".join(words[:cut]))
            after.append(" " + " ".join(words[cut : cut + 10]))
            docs.append(f"doc-{index}")
    explanations = [
        f'Ends "{" ".join(context.split()[-4:])}". Next {end.split()[0]}, the. Topic {context.split()[9]}.'
        for context, end in zip(contexts, after, strict=True)
    ]
    extraction = Extraction("m", target.config.d_model, LAYER, "c", CorpusSlice(0, len(contexts)), 2)
    return ActivationDataset(
        activations=target.activations(contexts)[:, 0],
        explanations=explanations,
        doc_ids=docs,
        n_raw_tokens=np.array([len(target.encode(context)) for context in contexts]),
        contexts=contexts,
        extra={
            "genre": [("news", "tale")[int(doc[4:]) % 2] for doc in docs],
            "next_words": [[end.split()[0], "the"] for end in after],
            "true_continuation": after,
            # Labels alone: the earlier row of each document counts as read inside of a sentence.
            "place": ["inside", "sentence_end"] * (len(docs) // 2),
        },
        sidecar=Sidecar("x", "base", len(contexts), extraction),
    )


def yardstick_of(training: ActivationDataset) -> Yardstick:
    places = np.array(training.extra["place"])
    of_places = {place: Yardstick.of(training.activations[places == place]) for place in set(places.tolist())}
    return dataclasses.replace(Yardstick.of(training.activations), places=of_places)


@pytest.fixture(scope="session")
def subject(tiny_lm) -> Subject:
    """The AV repeats the explainer's texts with one word wrong in every third; the ARs are ridge regressions."""
    lm = dataclasses.replace(tiny_lm, params=stack_blocks(tiny_lm.params))
    target = TargetLM(lm, lm.config, LAYER, batch_tokens=4096)
    training, held_out = rows(target, range(100), 0), rows(target, range(100, 116), 1)

    def write(activations_ND, *, temperature=0.0, seed=0, desc=None):
        distance = ((activations_ND[:, None] - held_out.activations[None]) ** 2).sum(axis=-1)
        texts = [held_out.explanations[i] for i in distance.argmin(axis=1)]
        # Samples differ; every seventh answer has failed.
        return [
            None
            if (i + seed) % 7 == 6
            else text.replace("Topic ", "Topic old ")
            if (i + seed) % 3 == 0
            else text
            for i, text in enumerate(texts)
        ]

    def reader(part: slice):
        known = training.take(part)

        def read(texts):
            return ridge_from_words([text or "" for text in texts], known.explanations, known.activations)

        return read

    return Subject(
        held_out,
        training,
        yardstick_of(training),
        {"warm start": lambda h, **_: write(h, seed=1), "after RL": write},
        {
            "own": reader(slice(0, 120)),
            "judge": reader(slice(80, None)),
            "second judge": reader(slice(40, 160)),
        },
        functools.cache(lambda: target),
        EvaluationConfig(
            rows=32,
            samples=2,
            prediction_rows=12,
            task_examples=8,
            task_taught=24,
            recurrence_rows=4,
            rewrite_rows=16,
            generated_rows=8,
            bootstrap_samples=100,
        ),
        tokens_of=lambda h, **how: [target.continuation(text or "") for text in write(h, **how)],
        marker="<empty_output>",
    )
