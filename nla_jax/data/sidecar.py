"""The sidecar: the YAML file beside a parquet shard that says what its activations and token ids mean.

Field names are the keys of the file, which other implementations of the method read and write as well.
"""

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nla_jax.files import AnyPath, Place, as_path, write_text

KIND = "nla_dataset"
SCHEMA_VERSION = 1
STAGES = ("base", "av_sft", "ar_sft", "rl")
STORAGES = ("float32", "bfloat16")
"""The dtypes in which activations may lie on disk; the first is the one of the shared format."""

Part = TypeVar("Part")


@dataclasses.dataclass(frozen=True)
class CorpusSlice:
    """The documents of the corpus that were read."""

    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The origin of the activations: model, layer, corpus and positions."""

    base_model: str
    d_model: int
    layer_index: int
    """The residual stream after this block, counted from 0."""
    corpus: str
    corpus_slice: CorpusSlice
    positions_per_doc: int
    norm: str = "none"
    """Activations are stored raw."""
    corpus_documents: int | None = None
    """How many documents of the corpus were chosen; None where that was not recorded, like the digest."""
    corpus_digest: str | None = None
    """Identifies those documents by ids, texts and genres."""

    def __post_init__(self):
        if self.norm != "none":
            raise ValueError(f"extraction.norm is {self.norm!r}, expected 'none'; extract raw activations")


@dataclasses.dataclass(frozen=True)
class PromptIds:
    """Token ids that the live tokenizer must reproduce."""

    injection_char: str
    """The marker."""
    injection_token_id: int
    injection_left_neighbor_id: int
    injection_right_neighbor_id: int
    critic_suffix_ids: tuple[int, ...] | None = None
    """Ids of the AR template's suffix without its first token, which may merge with the explanation."""

    def disagreements(self, live: "PromptIds") -> dict[str, tuple[Any, Any]]:
        """The fields in which the live tokenizer gives something else, each with both values.

        Suffixes agree if one ends with the other: writers differ in how many tokens they count before the fixed
        ones. A suffix that only one side has is not compared.
        """
        pairs = {
            field.name: (getattr(self, field.name), getattr(live, field.name))
            for field in dataclasses.fields(PromptIds)
        }
        recorded, found = pairs["critic_suffix_ids"]
        shorter = min(len(recorded), len(found)) if recorded is not None and found is not None else 0
        if not shorter or recorded[-shorter:] == found[-shorter:]:
            del pairs["critic_suffix_ids"]
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


@dataclasses.dataclass(frozen=True)
class SidecarTemplates:
    """Prompt texts: `actor` is the AV's user message, `critic` the AR's prompt."""

    actor: str | None = None
    critic: str | None = None


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Contents of one sidecar."""

    dataset_id: str
    stage: str
    """One of `STAGES`."""
    row_count: int
    extraction: Extraction
    tokens: PromptIds | None = None
    """Needed for every stage but `base`."""
    prompt_templates: SidecarTemplates = SidecarTemplates()
    """Stages `av_sft` and `rl` need `actor`, `ar_sft` needs `critic`."""
    parent_datasets: tuple[str, ...] = ()
    """The `dataset_id` of each data set that this one was made from."""
    created_at: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    """ISO 8601, UTC."""
    created_by: str = "nla_jax"
    git_commit: str = ""
    storage: str = "float32"
    """One of `STORAGES`. Rows are float32 in memory, whatever they are on disk."""
    file_bytes: int | None = None
    """Size of the shard's file; None where it was not recorded, like the digest."""
    file_sha256: str | None = None
    """SHA-256 of the shard's file, as hexadecimal digits."""
    texts: dict[str, Any] | None = None
    """Who wrote the texts, with names and digests of what decides them: see `Writer.about` in data/writers/open.py.
    None for rows without texts, and where that was not recorded."""
    kind: str = KIND
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self):
        if self.kind != KIND:
            raise ValueError(
                f"kind is {self.kind!r}, expected {KIND!r}; this is not the sidecar of a data set"
            )
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version!r}, this version reads {SCHEMA_VERSION}"
            )
        if self.stage not in STAGES:
            raise ValueError(f"unknown stage {self.stage!r}; the stages are {', '.join(STAGES)}")
        if self.storage not in STORAGES:
            raise ValueError(f"unknown storage {self.storage!r}; this version reads {', '.join(STORAGES)}")
        needed = {
            "tokens": self.stage != "base" and self.tokens is None,
            "prompt_templates.actor": self.stage in ("av_sft", "rl") and self.prompt_templates.actor is None,
            "prompt_templates.critic": self.stage == "ar_sft" and self.prompt_templates.critic is None,
        }
        if missing := [name for name, is_missing in needed.items() if is_missing]:
            raise ValueError(f"a sidecar of stage {self.stage!r} needs {', '.join(missing)}")

    def save(self, path: Place) -> None:
        """Write the sidecar as YAML, atomically."""
        write_yaml(path, without_none(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Place) -> "Sidecar":
        """Read a sidecar; fields that are not part of this version are ignored.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not YAML, another kind or schema version, or a missing field, named with the path.
        """
        with naming(path):
            fields = read_yaml(path, KIND, "the sidecar of a data set")
            tokens = fields.get("tokens")
            return read_part(
                cls,
                {
                    **fields,
                    "extraction": read_part(Extraction, fields.get("extraction"), "extraction"),
                    "tokens": None if tokens is None else read_part(PromptIds, tokens, "tokens"),
                    "prompt_templates": read_part(
                        SidecarTemplates, fields.get("prompt_templates") or {}, "prompt_templates"
                    ),
                },
                "the sidecar",
            )

    def check(self, *, base_model: str, layer_index: int, d_model: int, tokens: PromptIds) -> None:
        """Compare the contract with the live model, config and tokenizer.

        Raises:
          ValueError: naming both values of every mismatch.
        """
        live = {
            "extraction.layer_index": (self.extraction.layer_index, layer_index),
            "extraction.d_model": (self.extraction.d_model, d_model),
        }
        if not _is_same_model(self.extraction.base_model, base_model):
            live["extraction.base_model"] = (self.extraction.base_model, base_model)
        if self.tokens is not None:
            live |= {f"tokens.{name}": pair for name, pair in self.tokens.disagreements(tokens).items()}
        if wrong := [
            f"{name}: data {recorded!r}, run {found!r}"
            for name, (recorded, found) in live.items()
            if recorded != found
        ]:
            marker = self.tokens.injection_char if self.tokens is not None else tokens.injection_char
            other_marker = f"; set templates.marker to {marker!r}" if marker != tokens.injection_char else ""
            raise ValueError(
                f"data set {self.dataset_id!r} does not fit this run: {'; '.join(wrong)}; "
                f"use the model and tokenizer it was extracted with, or extract again{other_marker}"
            )


def sidecar_path_for(path: Place) -> AnyPath:
    """The path of a parquet shard's sidecar, which lies beside the shard and is named after it."""
    path = as_path(path)
    return path.with_name(f"{path.name}.nla_meta.yaml")


def _is_same_model(name: str, other: str) -> bool:
    """Whether two model specs may mean one model: a copy here or in a bucket is named like the hub model it is of."""
    is_copy = any(Path(spec).is_absolute() or "://" in spec for spec in (name, other))
    return name == other or (is_copy and Path(name).name == Path(other).name)


def read_yaml(path: Place, kind: str, meaning: str) -> dict[str, Any]:
    """Read a YAML mapping whose `kind` is the expected one.

    Args:
      path: file to read.
      kind: the only kind that is accepted.
      meaning: words for a file of that kind, for the error message.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not YAML, or of another kind.
    """
    fields = yaml.safe_load(as_path(path).read_bytes().decode("utf-8-sig"))
    if not isinstance(fields, dict) or fields.get("kind") != kind:
        found = fields.get("kind") if isinstance(fields, dict) else type(fields).__name__
        raise ValueError(f"kind is {found!r}, expected {kind!r}; this is not {meaning}")
    return fields


def write_yaml(path: Place, fields: Mapping[str, Any]) -> None:
    """Write a mapping of plain values as YAML, atomically."""
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    write_text(path, text)


@contextlib.contextmanager
def naming(path: Place) -> Iterator[None]:
    """Put the path before the message of any error that the block raises because the file is unreadable."""
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_part(kind: type[Part], fields: Any, name: str) -> Part:
    """Build a flat dataclass (or an `Extraction`) from YAML values; entries it does not know are left out.

    Raises:
      ValueError: not a mapping, or a field without default is missing; the message calls it `name`.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{name} is {fields!r}, expected a mapping")
    known = {field.name: field for field in dataclasses.fields(kind)}
    required = [
        field.name
        for field in known.values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [field for field in required if field not in fields]:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    if kind is Extraction:
        values["corpus_slice"] = read_part(CorpusSlice, values["corpus_slice"], "extraction.corpus_slice")
    return kind(**{key: value for key, value in values.items() if key in known})


def without_none(value: Any) -> Any:
    """Mappings without their None entries and lists for tuples, as YAML's plain types want them."""
    if isinstance(value, dict):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, tuple) else value
