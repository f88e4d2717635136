"""Where rows of a training stage keep their texts: in prompts, between tags in responses, or in their own column."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nla_jax.autoencoder.prompts import EXPLANATION_SLOT, INJECTION_SLOT
from nla_jax.data.sidecar import Sidecar, SidecarTemplates
from nla_jax.files import AnyPath

INJECT_PLACEHOLDER = "<INJECT>"
"""The text that stands in a stored AV prompt where the marker goes."""
EXPLANATION_OPEN, EXPLANATION_CLOSE = "<explanation>", "</explanation>"


def stage_columns(
    stage: str, base: Mapping[str, Any], templates: SidecarTemplates
) -> dict[str, Sequence[Any] | np.ndarray]:
    """Turn `base` columns into those of a training stage.

    Args:
      stage: `av_sft` (prompt and response), `ar_sft` (filled AR template as prompt) or `rl` (prompt alone).
      base: columns as for `write_shard`, with `api_explanation` for the two supervised stages.
      templates: `actor` holds `{injection_char}` once, `critic` holds `{explanation}` once.

    Returns:
      the columns without `api_explanation`, and the stage's own columns; explanations lose their outer blanks.

    Raises:
      ValueError: an unknown stage, a template without its slot, or an explanation that is missing, blank or
        contains one of the tags that mark its ends.
    """
    columns = {name: c for name, c in base.items() if name not in ("api_explanation", "prompt", "response")}
    if stage not in ("av_sft", "ar_sft", "rl"):
        raise ValueError(f"unknown training stage {stage!r}; expected av_sft, ar_sft or rl")
    explanations = [] if stage == "rl" else _clean_explanations(base)
    if stage == "ar_sft":
        before, after = _split_template("critic", templates.critic, EXPLANATION_SLOT)
        return {**columns, "prompt": [before + text + after for text in explanations]}
    content = INJECT_PLACEHOLDER.join(_split_template("actor", templates.actor, INJECTION_SLOT))
    columns["prompt"] = [[{"role": "user", "content": content}] for _ in base["doc_id"]]
    if stage == "av_sft":
        columns["response"] = [f"{EXPLANATION_OPEN}\n{text}\n{EXPLANATION_CLOSE}" for text in explanations]
    return columns


def holds_a_tag(text: str) -> bool:
    """Whether a text holds one of the two tags that data sets enclose an explanation in, and so cannot be stored."""
    return EXPLANATION_OPEN in text or EXPLANATION_CLOSE in text


def explanations_of(table: pa.Table, sidecar: Sidecar, path: AnyPath) -> list[str] | None:
    """Read the explanations of a shard from where its stage keeps them.

    Args:
      table: the shard's rows.
      sidecar: the shard's own.
      path: the shard's, for messages.

    Returns:
      One a row without blanks around it; None for stages without explanations.

    Raises:
      ValueError: a supervised stage without explanations, or rows that lack theirs.
    """
    names, is_supervised = table.column_names, sidecar.stage in ("av_sft", "ar_sft")
    if "api_explanation" in names:
        column, read = "api_explanation", str.strip
        if not is_supervised and table[column].null_count == len(table):
            return None
    elif sidecar.stage == "av_sft" and "response" in names:
        column, read = "response", _inside_tags
    elif sidecar.stage == "ar_sft" and "prompt" in names:
        column, read = "prompt", _inside(sidecar.prompt_templates.critic)
    elif is_supervised:
        raise ValueError(f"shard {path} of stage {sidecar.stage!r} holds no explanations; columns: {names}")
    else:
        return None
    found = table[column].to_pylist()
    if column == "response" and not any(holds_a_tag(text) for text in found if isinstance(text, str)):
        read = str.strip  # Answers that never had tags are explanations as they are.
    texts = [read(text) if isinstance(text, str) else "" for text in found]
    if empty := [row for row, text in enumerate(texts) if not text]:
        raise ValueError(
            f"shard {path}: {len(empty)} of {len(texts)} rows have no explanation where stage {sidecar.stage!r} keeps "
            f"it, in the column {column!r}; the first is row {empty[0]}, which holds {str(found[empty[0]])[:80]!r}. "
            "Leave these rows out, or write the shard again"
        )
    return texts


def _inside_tags(response: str) -> str:
    found = re.search(f"{EXPLANATION_OPEN}(.*?){EXPLANATION_CLOSE}", response, re.DOTALL)
    return found[1].strip() if found else ""


def _inside(template: str | None) -> Callable[[str], str]:
    """What reads the explanation out of a filled AR template; empty where the template is another one."""
    before, after = _split_template("critic", template, EXPLANATION_SLOT)

    def read(prompt: str) -> str:
        is_filled = prompt.startswith(before) and prompt.endswith(after)
        return prompt[len(before) : len(prompt) - len(after)].strip() if is_filled else ""

    return read


def _clean_explanations(base: Mapping[str, Any]) -> list[str]:
    if "api_explanation" not in base:
        raise ValueError("supervised stages need the column api_explanation; explain the activations first")
    cleaned = []
    for doc_id, text in zip(base["doc_id"], base["api_explanation"], strict=True):
        text = (text or "").strip()
        if not text or holds_a_tag(text):
            raise ValueError(
                f"explanation {text!r} of document {doc_id!r} is blank or contains an explanation tag; "
                "drop the row or explain it again"
            )
        cleaned.append(text)
    return cleaned


def _split_template(name: str, template: str | None, slot: str) -> tuple[str, str]:
    if template is None or template.count(slot) != 1:
        raise ValueError(f"prompt_templates.{name} must contain {slot} exactly once, got {template!r}")
    before, _, after = template.partition(slot)
    return before, after
