"""Measuring suites: which there are, which are due, and what each leaves in the evaluation's folder."""

import importlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
from tqdm import tqdm

from nla_jax.chat.models import open_chat_model
from nla_jax.evaluation.dictionary_baseline import open_dictionary
from nla_jax.evaluation.subject import Subject
from nla_jax.evaluation.tables import write_ratios
from nla_jax.files import AnyPath, write_json
from nla_jax.sharding.placement import wait_for_all

SUITES = {
    "reconstruction": "what comes back through each AR, and where",
    "controls": "controls, and baselines without a writer or reader",
    "prediction": "questions answered from the explanation alone",
    "faithfulness": "which claims are true, and whether the AR can tell",
    "degeneracy": "copying, private codes, readability",
    "cost": "tokens and seconds",
    "sanity": "whether planted cheaters are found out",
}
"""Name -> what the suite is about. Each is a module of `suites/` with `measure(subject) -> tables`."""
ASKING = ("prediction", "faithfulness")
"""Suites that ask a chat model, where the config names one."""


def chosen_suites(names: Sequence[str]) -> tuple[str, ...]:
    """The named suites, which are all of them where `all` is among the names, in the order of `SUITES`.

    Raises:
      ValueError: an unknown name.
    """
    if unknown := sorted(set(names) - {*SUITES, "all"}):
        raise ValueError(f"unknown suites {', '.join(unknown)}; there are: all, {', '.join(SUITES)}")
    return tuple(name for name in SUITES if name in names or "all" in names)


def measure_suites(subject: Subject, names: Sequence[str], directory: AnyPath, digest: str) -> dict[str, Any]:
    """Measure suites and write each as soon as it is done; suites written under the same digest are not measured again.

    Args:
      subject: the NLA under evaluation.
      names: names of suites, or `all`.
      directory: folder for `SUITE.json` (tables) and `SUITE.parquet` (each row's terms of each figure).
      digest: identifies everything that the figures depend on, except the chat model.

    Returns:
      name -> {"digest", "seconds", "tables"} of all suites in the folder.

    Raises:
      FileNotFoundError: the config names a dictionary that is not there.
      ValueError: the data lacks columns that a suite reads, or the config names a dictionary that cannot be read.
      ModuleNotFoundError: a suite's packages are missing.
      RuntimeError: the chat model does not answer; the answers so far are kept.
    """
    directory.mkdir(parents=True, exist_ok=True)
    chat_model = subject.config.chat_model
    todo = [
        name for name in chosen_suites(names) if name not in stored_results(directory, digest, chat_model)
    ]
    if "controls" in todo:
        open_dictionary(subject)  # One that cannot be read is told before anything is measured.
    if chat_model and subject.chat is None and set(todo) & set(ASKING):
        subject.chat = open_chat_model(chat_model, directory / "chat.sqlite")
    bar = tqdm(todo, desc="evaluate", unit="suite", dynamic_ncols=True, disable=jax.process_index() > 0)
    for name in bar:
        bar.set_postfix_str(name)
        try:
            suite = importlib.import_module(f"nla_jax.evaluation.suites.{name}")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the suite {name!r} needs the module {error.name}, which an installation of nla_jax brings along; "
                "install nla_jax again, or choose other suites (evaluation.suites)"
            ) from error
        started = time.perf_counter()
        tables = suite.measure(subject)
        if jax.process_index() == 0:
            seconds, samples = time.perf_counter() - started, subject.config.bootstrap_samples
            result = {
                "digest": digest_of(name, digest, chat_model),
                "seconds": seconds,
                "tables": [table.record(samples) for table in tables],
            }
            write_ratios(tables, directory / f"{name}.parquet")
            write_json(directory / f"{name}.json", result)
        wait_for_all(f"suite {name}")
    return stored_results(directory, digest, chat_model)


def digest_of(name: str, digest: str, chat_model: str) -> str:
    """The digest of everything that a suite's figures depend on, the chat model included where the suite asks one."""
    return f"{digest}-{chat_model}" if chat_model and name in ASKING else digest


def stored_results(directory: AnyPath, digest: str, chat_model: str = "") -> dict[str, Any]:
    """The suites that were measured under a digest and with a chat model, in the order of `SUITES`."""
    results = {}
    for name in SUITES:
        path = directory / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["digest"] == digest_of(name, digest, chat_model):
                results[name] = result
    return results
