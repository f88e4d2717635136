"""Data sets that were made elsewhere, taken over as the splits of a run."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.data.dataset import ActivationDataset, load_dataset, shards_of
from nla_jax.data.sidecar import Sidecar, sidecar_path_for
from nla_jax.data.splits import SPLITS, check_documents, hash_fraction
from nla_jax.files import Place, fingerprint


def adopt(
    paths: Mapping[str, str | None], *, held_out_share: float, seed: int
) -> dict[str, ActivationDataset]:
    """Load data sets as splits; held-out documents are in no other split.

    Args:
      paths: for every split, a shard or folder of shards. With None for `held_out`, a share of the documents of
        `av_sft`, chosen by their hash, is held out, and left out of all other splits.
      held_out_share: share of the documents of `av_sft` that is then held out.
      seed: seed of the hash.

    Raises:
      FileNotFoundError: as `load_dataset`.
      ValueError: as `load_dataset`; or a supervised split lacks explanations, held-out documents are in another split
        too, or a split has too few documents.
    """
    splits = {split: load_dataset(path) for split, path in paths.items() if path is not None}
    for split, data in splits.items():
        if split != "rl" and data.explanations is None:
            raise ValueError(
                f"{paths[split]} is of stage {data.sidecar.stage!r} and holds no explanations, which {split} "
                "needs; give the data set of that stage"
            )
    if "held_out" in splits:
        _check_disjoint(splits)
    else:
        splits = _hold_out(splits, held_out_share, seed)
    check_documents({split: len(set(data.doc_ids)) for split, data in splits.items()})
    return {split: splits[split] for split in SPLITS}


def _check_disjoint(splits: Mapping[str, ActivationDataset]) -> None:
    held_out = set(splits["held_out"].doc_ids)
    for split, data in splits.items():
        if split != "held_out" and (shared := sorted(held_out & set(data.doc_ids))):
            raise ValueError(
                f"{len(shared)} held-out documents are in {split} too, for instance {shared[0]!r}: figures on them "
                "would flatter; leave data.held_out unset to have documents held out of every split"
            )


def _hold_out(splits: dict[str, ActivationDataset], share: float, seed: int) -> dict[str, ActivationDataset]:
    documents = set(splits["av_sft"].doc_ids)
    held_out = {doc for doc in documents if hash_fraction(doc, seed=seed, purpose="held_out") < share}
    masks = {
        split: np.array([doc in held_out for doc in data.doc_ids], bool) for split, data in splits.items()
    }
    rows = splits["av_sft"].take(masks["av_sft"])
    # Each split is let go of once it is divided, so that there are never two copies of all rows.
    kept = {split: splits.pop(split).take(~mask) for split, mask in masks.items()}
    return {**kept, "held_out": rows}


def sidecars(path: Place) -> list[Sidecar]:
    """The sidecars of a shard, or of all shards of a folder; the rows are not read.

    Raises:
      FileNotFoundError: there is no shard, or one without its sidecar.
      ValueError: as `Sidecar.load`.
    """
    files = [sidecar_path_for(shard) for shard in shards_of(path)]
    if missing := [file for file in files if not file.exists()]:
        raise FileNotFoundError(
            f"data set {path} lacks {missing[0]}; give a .parquet file that has its sidecar beside it, or a folder of "
            "them"
        )
    return [Sidecar.load(file) for file in files]


def data_state(paths: Mapping[str, str | None]) -> dict[str, str] | None:
    """Fingerprints of all shards of data sets by their paths; None where a data set is not there any more."""
    given = [path for path in paths.values() if path is not None]
    try:
        return {str(shard): fingerprint(shard) for path in given for shard in shards_of(path)}
    except FileNotFoundError:
        return None


def splits_digest(splits: Mapping[str, ActivationDataset]) -> str:
    """Identifies the rows of splits by their documents, places, explanations and activations."""
    digest = hashlib.blake2b(digest_size=8)
    for split, data in splits.items():
        named = [split, data.doc_ids, data.n_raw_tokens.tolist(), data.explanations]
        digest.update(json.dumps(named).encode())
        digest.update(np.ascontiguousarray(data.activations))
    return digest.hexdigest()


def templates_of(*paths: Place) -> PromptTemplates:
    """The prompt templates that data sets were made for, for the config of a run that trains on them.

    Args:
      paths: data sets that together name both templates, such as those of `av_sft` and `ar_sft`.

    Raises:
      ValueError: the data sets disagree, or name no AV or no AR template.
    """
    contracts = [sidecar for path in paths for sidecar in sidecars(path)]
    values = {
        "verbalizer": {sidecar.prompt_templates.actor for sidecar in contracts},
        "reconstructor": {sidecar.prompt_templates.critic for sidecar in contracts},
        "marker": {sidecar.tokens and sidecar.tokens.injection_char for sidecar in contracts},
    }
    for name, choices in values.items():
        choices.discard(None)
        if len(choices) != 1:
            raise ValueError(
                f"{', '.join(map(str, paths))} name {len(choices)} texts for templates.{name}, expected one: "
                f"{sorted(choices)}; give the data sets of one pair of models"
            )
    return PromptTemplates(**{name: choices.pop() for name, choices in values.items()})
