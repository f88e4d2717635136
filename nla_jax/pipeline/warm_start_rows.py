"""The rows that the warm starts train on: which texts, and what is said of those that are too long."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import encode_reconstructor, encode_responses
from nla_jax.data.batches import reconstructor_rows, verbalizer_rows
from nla_jax.data.dataset import ActivationDataset, load_dataset
from nla_jax.data.stage_texts import holds_a_tag
from nla_jax.pipeline.digests import stage_digest
from nla_jax.pipeline.explain import write_rows
from nla_jax.pipeline.run import Run
from nla_jax.process import warn
from nla_jax.randomness import key_for


def closed_answers(codec: Autoencoder, data: ActivationDataset, batch_size: int) -> dict[str, np.ndarray]:
    """Columns of the AV's training rows. A text that would be cut is left out: it would teach the AV not to close.

    Raises:
      ValueError: the texts that fit do not fill a batch.
    """
    limit, prompt = codec.max_explanation_tokens, codec.verbalizer.prompt
    rows = verbalizer_rows(data, codec.tokenizer, prompt, limit)
    encode = functools.partial(encode_responses, codec.tokenizer, prompt)
    cut_N = _are_cut(data.explanations, rows["lengths_B"], limit, encode)
    if not cut_N.any():
        return dict(rows)
    share = (
        f"{cut_N.sum()} of {len(cut_N)} texts ({cut_N.mean():.1%}) have more tokens, with their closing, than"
    )
    if (~cut_N).sum() < batch_size:
        raise ValueError(
            f"av_sft: {share} max_explanation_tokens={limit}, and the others do not fill a batch of {batch_size}; "
            "raise max_explanation_tokens, or have shorter texts written (writer)"
        )
    warn(
        f"av_sft: {share} max_explanation_tokens={limit}. The AV is not trained on them: cut, they would teach it not "
        "to close its answers. Raise max_explanation_tokens to keep them"
    )
    return {name: column[~cut_N] for name, column in rows.items()}


def reconstructor_prompts(
    codec: Autoencoder, data: ActivationDataset, texts: list[str], stage: str
) -> dict[str, np.ndarray]:
    """Columns of the AR's training rows, with a warning where texts lose their ends."""
    limit, rows = codec.max_reconstructor_tokens, reconstructor_rows(codec, data.activations, texts)
    encode = functools.partial(encode_reconstructor, codec.tokenizer, codec.reconstructor.prompt)
    cut_N = _are_cut(texts, rows["lengths_B"], limit, encode)
    if cut_N.any():
        warn(
            f"{stage}: {cut_N.sum()} of {len(cut_N)} texts ({cut_N.mean():.1%}) have more tokens than "
            f"max_reconstructor_tokens={limit}. The AR does not read their ends; raise max_reconstructor_tokens"
        )
    return rows


def _are_cut(texts: Sequence[str], lengths_N: np.ndarray, limit: int, encode: Callable) -> np.ndarray:
    """Which texts were cut to `limit` tokens. Those that fill it are encoded again, with room for one token more."""
    are_cut_N = lengths_N == limit
    if are_cut_N.any():
        _, longer = encode([texts[i] for i in np.flatnonzero(are_cut_N)], limit + 1)
        are_cut_N[are_cut_N] = longer > limit
    return are_cut_N


def partly_verbalized(run: Run, data: ActivationDataset, share: float) -> list[str]:
    """The rows' explainer texts, a share of them replaced by what the warm-start AV writes at temperature 1.

    The AV's texts are kept in data/verbalized. Where it failed, or wrote a tag into its text, the explainer's text
    stays.
    """
    texts, path = list(data.explanations), run.directory / "data" / "verbalized" / "verbalized.parquet"
    digest, seed = stage_digest(run.config, "ar_sft"), run.config.seed
    chosen = np.random.default_rng(seed).permutation(len(data))[: round(share * len(data))]
    if not len(chosen):
        return texts
    if not run.is_written(path, digest):
        run.models.release_target()
        part, key = data.take(chosen), key_for(seed, "verbalize")
        written = run.models.round_trip.verbalize(
            run.models.warm_start_params("av"), part.activations, key, 1.0, desc="verbalize"
        )
        kept = [
            own if own and not holds_a_tag(own) else explained
            for own, explained in zip(written, part.explanations, strict=True)
        ]
        part = dataclasses.replace(part, explanations=kept)
        write_rows(run, path, part, stage="ar_sft", digest=digest)
    for row, text in zip(chosen, load_dataset(path).explanations, strict=True):
        texts[row] = text
    return texts
