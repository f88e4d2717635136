"""`nla_meta.yaml`: the file in a model directory that says how a language model is used as AV or AR.

It is the reference implementation's contract (https://github.com/kitft/natural_language_autoencoders). Releases call
the two models av and ar, its training actor and critic; both spellings are read, the first is written. Settings that
the contract has no field for go into one further block, `nla_jax`, which other readers ignore.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from nla_jax.autoencoder.prompts import EXPLANATION_SLOT, INJECTION_SLOT, PromptTemplates
from nla_jax.autoencoder.verbalizer import InjectionConfig
from nla_jax.data.sidecar import (
    PromptIds,
    SidecarTemplates,
    naming,
    read_part,
    read_yaml,
    without_none,
    write_yaml,
)
from nla_jax.files import Place, as_path

FILE_NAME = "nla_meta.yaml"
KIND = "nla_model"
SCHEMA_VERSION = 2
ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
"""Spelling in the file -> the role."""
OWN_BLOCK = "nla_jax"
SQRT_D = "sqrt_d_model"
"""A word that a file may give instead of a scale; it stands for √d."""


@dataclasses.dataclass(frozen=True)
class OwnSettings:
    """The settings of a model of this library that the shared fields do not hold."""

    forced_start: str
    """As in `PromptTemplates`, like the next two."""
    closing: str
    chat: bool
    layer: int
    """As in `InjectionConfig`, like the next two."""
    mode: Literal["replace", "add"]
    affine: bool
    scale: float
    """The injection scale, repeated: `extraction.injection_scale` is left empty if a reader of the shared fields
    alone would inject wrongly."""
    max_explanation_tokens: int | None = None
    """Longest answer in training; None in models that were written before this was recorded."""
    max_reconstructor_tokens: int | None = None
    """Longest AR prompt in training, after its shared prefix."""
    min_position: int | None = None
    """The first position that activations were read at."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Operand dtype of the products with weights in training."""


@dataclasses.dataclass(frozen=True)
class NLAMeta:
    """Contents of one `nla_meta.yaml`."""

    role: Literal["av", "ar"]
    d_model: int
    tokens: PromptIds
    prompt_templates: SidecarTemplates
    """`actor` is the AV's user message, `critic` the AR's prompt; literal braces are single."""
    injection_scale: float | None = None
    """Norm at which an activation replaces the marker's embedding; ARs have none."""
    mse_scale: float | None = None
    """Norm of the vectors that the reference compares; √d makes the MSE 2(1 − cos)."""
    layer: int | None = None
    """The residual stream after this block, counted from 0; needed for an AR, which has one block more."""
    own: OwnSettings | None = None
    """Settings that only exports of this library have."""

    def __post_init__(self):
        if self.role == "av":
            needed = {
                "prompt_templates.av": self.prompt_templates.actor,
                "extraction.injection_scale": self.injection_scale if self.own is None else self.own.scale,
            }
        else:
            needed = {
                "prompt_templates.ar": self.prompt_templates.critic,
                "ar.extraction_layer_index": self.layer,
            }
        if missing := [name for name, value in needed.items() if value is None]:
            raise ValueError(f"the meta data of an {self.role.upper()} needs {', '.join(missing)}")

    @property
    def templates(self) -> PromptTemplates:
        """The prompts as this library takes them; the half that belongs to the other model may be a default.

        A reference AV writes `<explanation>`, a line break, the text, a line break and `</explanation>`. The second
        line break is left out of the closing: most tokenizers merge it with the full stop before it.
        """
        texts = {"verbalizer": self.prompt_templates.actor, "reconstructor": self.prompt_templates.critic}
        given = without_none(texts) | {"marker": self.tokens.injection_char}
        if self.own is None:
            return PromptTemplates(**given, closing="</explanation>")
        own = self.own
        return PromptTemplates(**given, forced_start=own.forced_start, closing=own.closing, chat=own.chat)

    @property
    def injection(self) -> InjectionConfig:
        """The place and manner of an AV's injection; by default the activation replaces the marker's embedding."""
        if self.own is None:
            return InjectionConfig(scale=self.injection_scale)
        return InjectionConfig(self.own.layer, self.own.mode, self.own.scale, self.own.affine)

    def check_tokens(self, live: PromptIds, where: Place) -> None:
        """Compare the token ids with the live tokenizer's.

        Raises:
          ValueError: naming both values of every disagreement.
        """
        if wrong := self.tokens.disagreements(live):
            values = "; ".join(f"{name}: meta {a!r}, tokenizer {b!r}" for name, (a, b) in wrong.items())
            raise ValueError(
                f"the token ids in {as_path(where) / FILE_NAME} are not those of the tokenizer beside it: {values}; "
                "use the tokenizer files that came with the model"
            )

    def save(self, directory: Place) -> None:
        """Write the file into a model directory."""
        roles = {"av": self.prompt_templates.actor, "ar": self.prompt_templates.critic}
        slots = {"av": INJECTION_SLOT, "ar": EXPLANATION_SLOT}
        fields = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "role": self.role,
            "d_model": self.d_model,
            "extraction_layer_index": self.layer,
            # Empty rather than absent: readers take an absent scale for a default one.
            "extraction": {"injection_scale": self.injection_scale, "mse_scale": self.mse_scale},
            "tokens": {**dataclasses.asdict(self.tokens)},
            "prompt_templates": {
                role: _as_format(text, slots[role]) for role, text in roles.items() if text is not None
            },
            "created_by": "nla_jax",
        }
        if fields["tokens"]["critic_suffix_ids"] is not None:
            fields["tokens"]["critic_suffix_ids"] = list(self.tokens.critic_suffix_ids)
        if self.role == "ar":
            fields["ar"] = {"extraction_layer_index": self.layer}
        if self.own is not None:
            fields[OWN_BLOCK] = dataclasses.asdict(self.own)
        write_yaml(as_path(directory) / FILE_NAME, fields)

    @classmethod
    def load(cls, directory: Place, role: Literal["av", "ar"] | None = None) -> "NLAMeta":
        """Read the file of a model directory; fields that are not part of this version are ignored.

        Args:
          directory: directory of the model.
          role: the role that the model must have; None accepts both.

        Raises:
          FileNotFoundError: the directory has no such file, so it is not a model of an NLA.
          ValueError: another kind or schema version, the other role, or a missing field; the message names the path.
        """
        path = as_path(directory) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"no {FILE_NAME} in {directory}: not a model of an NLA, or copied without this file; get it from "
                "where the model came from"
            )
        with naming(path):
            fields = read_yaml(path, KIND, "the meta data of a model")
            values = _meta_fields(fields)
            if role not in (None, values["role"]):
                wanted, found = role.upper(), values["role"].upper()
                raise ValueError(
                    f"role is {fields['role']!r}: this is an {found}, not an {wanted}; give the {wanted}'s directory"
                )
            return cls(**values)


def _meta_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of NLAMeta out of a file's fields."""
    needed = ("schema_version", "role", "d_model", "extraction", "tokens", "prompt_templates")
    if missing := [name for name in needed if fields.get(name) is None]:
        raise ValueError(f"the meta data lacks {', '.join(missing)}")
    if fields["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"schema_version is {fields['schema_version']!r}, this version reads {SCHEMA_VERSION}"
        )
    if fields["role"] not in ROLES:
        raise ValueError(f"role is {fields['role']!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(fields["d_model"], int):
        raise ValueError(f"d_model is {fields['d_model']!r}, expected an integer")
    for name in ("extraction", "tokens", "prompt_templates"):
        if not isinstance(fields[name], Mapping):
            raise ValueError(f"{name} is {fields[name]!r}, expected a mapping")
    texts = fields["prompt_templates"]
    own = fields.get(OWN_BLOCK)
    return {
        "role": ROLES[fields["role"]],
        "d_model": fields["d_model"],
        "tokens": read_part(PromptIds, fields["tokens"], "tokens"),
        "prompt_templates": SidecarTemplates(
            _from_format(texts.get("av", texts.get("actor"))),
            _from_format(texts.get("ar", texts.get("critic"))),
        ),
        "injection_scale": _scale(fields, "injection_scale"),
        "mse_scale": _scale(fields, "mse_scale"),
        "layer": _layer(fields),
        "own": None if own is None else read_part(OwnSettings, own, OWN_BLOCK),
    }


def _scale(fields: Mapping[str, Any], name: str) -> float | None:
    if (value := fields["extraction"].get(name)) is None:
        return None
    try:
        return fields["d_model"] ** 0.5 if value == SQRT_D else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extraction.{name} is {value!r}, expected a number or {SQRT_D!r}") from error


def _layer(fields: Mapping[str, Any]) -> int | None:
    """The extraction layer, which files keep in several places; None if in none of them."""
    layers = {"extraction_layer_index": fields.get("extraction_layer_index")}
    for role in ROLES:
        for name in ("extraction_layer_index", "num_hidden_layers"):
            # Here, and unlike in config.json, num_hidden_layers is the layer's index.
            layers[f"{role}.{name}"] = (fields.get(role) or {}).get(name)
    layers = without_none(layers)
    if len(set(layers.values())) > 1:
        raise ValueError(f"the extraction layer is not one: {layers}")
    return next(iter(layers.values()), None)


def _as_format(template: str, slot: str) -> str:
    """A template for Python's `str.format`, which is what the reference fills templates with."""
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in template.split(slot))
    return before + slot + after


def _from_format(template: str | None) -> str | None:
    return None if template is None else template.replace("{{", "{").replace("}}", "}")
