"""What identifies a stage's result: a hash of the config fields that it depends on."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from nla_jax.config import ExperimentConfig, plain
from nla_jax.data.corpora.config import CorpusConfig
from nla_jax.data.splits import MONITOR_SHARE

STAGE_FIELDS = {
    "extract": ("seed", "model", "corpus", "data", "extraction"),
    "explain": ("writer", "templates"),
    "av_sft": ("injection", "lora", "max_explanation_tokens", "av_sft"),
    "ar_sft": ("max_reconstructor_tokens", "ar_sft"),
    "distill": ("distill",),
    "rl": ("rl",),
    "evaluate": ("evaluation",),
    "report": (),
}
"""The stages in order, each with the config fields that it adds to what defines its result."""
_LATER_FIELDS = {
    "ar_sft": ("verbalized_samples", "cut", "balance_places"),
    "rl": ("ar_updates", "replay_rounds", "writer_share", "balance_places", "cut"),
}
"""Fields of training stages that earlier versions lacked, whose defaults do what those did."""
_LATER_POLICY_FIELDS = ("std_of", "drop_flat_groups")


def _corpus_fields(config: ExperimentConfig) -> dict[str, Any]:
    """The corpus of a config without the fields that earlier versions lacked, where those are as they were then."""
    earlier, default = ("source", "max_documents", *config.corpus.fractions), plain(CorpusConfig())
    fields = plain(config.corpus)
    if config.corpus.has_self_chat:
        del fields["self_chat"]["batch_size"]  # Every answer has a key of its own.
    else:
        del fields["self_chat"]
    return {name: value for name, value in fields.items() if name in earlier or value != default[name]}


def corpus_digest(config: ExperimentConfig) -> str:
    """Hash of the config fields that decide which documents are chosen, and in which order."""
    fields = {"seed": config.seed, **_corpus_fields(config)}
    if config.corpus.has_self_chat:
        fields["model"] = config.model.path
    for name in config.corpus.fractions:
        del fields[name]
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def _leave_out_defaults(values: dict[str, Any], kind: type, names: Sequence[str]) -> None:
    """Remove those of the named fields of a config that are at their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for name in names:
        if values[name] == defaults[name]:
            del values[name]


def stage_digest(config: ExperimentConfig, stage: str) -> str:
    """Hash of the config fields that define a stage's result: its own and those of the stages before it.

    Left out are fields that may change on the way: where arrays live, what computes attention, whether blocks are
    scanned, how padding is left out, how many RL rounds there are, how many checkpoints are kept, and what is watched;
    the chat model, which only some suites ask (`evaluation.suites`); the tasks that joint training is watched on; and
    of the writer of warm-start texts whatever decides no text: the options of other writers, the budget, and how many
    requests are sent at a time.
    """
    fields: dict[str, Any] = {}
    for name, own in STAGE_FIELDS.items():
        fields |= {field: plain(getattr(config, field)) for field in own}
        if name == stage:
            break
    if "writer" in fields:
        del fields["writer"]
        if config.writer.name == "predictive":
            # Runs keep the digest that they had when there was no other writer.
            fields["explainer"] = plain(config.writer.predictive)
        else:
            fields["writer"] = config.writer.identity()
    for choice in ("attention", "scan_blocks"):
        del fields["model"][choice]
    if config.model.initial_path is None or stage == "extract":
        del fields["model"]["initial_path"]  # Activations do not depend on it, and runs keep their digests.
    if not config.model.frozen_blocks or stage in ("extract", "explain"):
        del fields["model"]["frozen_blocks"]  # The same holds here.
    fields["extraction"] = config.extraction.identity()
    fields["corpus"] = _corpus_fields(config)
    if not config.data.is_given:
        del fields["data"]  # The same holds of runs that extract.
    if not config.lora.rank:
        fields.pop("lora", None)  # And of runs without adapters.
    if not config.distill.loop.steps:
        fields.pop("distill", None)  # And of runs that distill nothing.
    for trained in ("av_sft", "ar_sft", "distill", "rl"):
        if trained in fields:
            del fields[trained]["loop"]["keep_checkpoints"], fields[trained]["length_buckets"]
            _leave_out_defaults(
                fields[trained], type(getattr(config, trained)), _LATER_FIELDS.get(trained, ())
            )
    if "rl" in fields:
        _leave_out_defaults(fields["rl"]["policy"], type(config.rl.policy), _LATER_POLICY_FIELDS)
        del fields["rl"]["loop"]["steps"], fields["rl"]["guards"], fields["rl"]["gather_weights"]
    if "evaluation" in fields:
        for without_figures in ("chat_model", "monitor_tasks"):
            del fields["evaluation"][without_figures]
        # It decides which held-out rows figures are of.
        fields["monitor_share"] = MONITOR_SHARE
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()
