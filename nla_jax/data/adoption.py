"""Data sets that were made elsewhere, taken over as the splits of a run."""

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from nla_jax.autoencoder.prompts import PromptTemplates
from nla_jax.data.shards import shards_of
from nla_jax.data.sidecar import Sidecar, sidecar_path_for
from nla_jax.data.splits import SPLITS, check_documents, hash_fraction
from nla_jax.data.store import StoredDataset, open_dataset
from nla_jax.files import Place, fingerprint


def adopt(paths: Mapping[str, str | None], *, held_out_share: float, seed: int) -> dict[str, StoredDataset]:
    """Open data sets as splits; held-out documents are in no other split. Of the rows only the documents are read.

    Args:
      paths: for every split, a shard or folder of shards. With None for `held_out`, a share of the documents of
        `av_sft`, chosen by their hash, is held out, and left out of all other splits.
      held_out_share: share of the documents of `av_sft` that is then held out.
      seed: seed of the hash.

    Raises:
      FileNotFoundError: as `open_dataset`.
      ValueError: as `open_dataset`; or a supervised split lacks explanations, held-out documents are in another split
        too, or a split has too few documents.
    """
    splits = {split: open_dataset(path) for split, path in paths.items() if path is not None}
    for split, data in splits.items():
        if split != "rl" and not data.holds_explanations:
            raise ValueError(
                f"{paths[split]} is of stage {data.sidecar.stage!r} and holds no explanations, which {split} "
                "needs; give the data set of that stage"
            )
    if "held_out" in splits:
        _check_disjoint(splits)
    else:
        splits = _hold_out(splits, held_out_share, seed)
    check_documents({split: len(documents_of(data)) for split, data in splits.items()})
    return {split: splits[split] for split in SPLITS}


def documents_of(data: StoredDataset) -> set[str]:
    """The documents of a data set, of which nothing else is in memory."""
    return {doc_id for (doc_ids,) in data.scan("doc_id") for doc_id in doc_ids}


def _check_disjoint(splits: Mapping[str, StoredDataset]) -> None:
    held_out = documents_of(splits["held_out"])
    for split, data in splits.items():
        if split != "held_out" and (shared := sorted(held_out & documents_of(data))):
            raise ValueError(
                f"{len(shared)} held-out documents are in {split} too, for instance {shared[0]!r}: figures on them "
                "would flatter; leave data.held_out unset to have documents held out of every split"
            )


def _hold_out(splits: Mapping[str, StoredDataset], share: float, seed: int) -> dict[str, StoredDataset]:
    documents = documents_of(splits["av_sft"])
    held_out = {doc for doc in documents if hash_fraction(doc, seed=seed, purpose="held_out") < share}
    masks = {
        split: np.array([doc in held_out for (doc_ids,) in data.scan("doc_id") for doc in doc_ids], bool)
        for split, data in splits.items()
    }
    kept = {split: data.take(~masks[split]) for split, data in splits.items()}
    return {**kept, "held_out": splits["av_sft"].take(masks["av_sft"])}


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


def splits_digest(splits: Mapping[str, StoredDataset]) -> str:
    """Identifies the rows of splits by their documents, places, explanations and activations.

    It is the digest of a JSON list of the split's name and of these columns, and of the activations in float32; the
    list is made up piece by piece, so that no split is in memory.
    """
    digest = hashlib.blake2b(digest_size=8)
    for split, data in splits.items():
        columns = ["doc_id", "n_raw_tokens", *["explanation"] * data.holds_explanations]
        digest.update(f"[{json.dumps(split)}".encode())
        for column in columns:
            digest.update(b", [")
            for number, (values,) in enumerate(data.scan(column)):
                digest.update(b", " * (number > 0) + json.dumps(values)[1:-1].encode())
            digest.update(b"]")
        digest.update(b"]" if data.holds_explanations else b", null]")
        for part in data.parts():
            digest.update(np.ascontiguousarray(part.activations))
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
