"""Planted tasks that joint training is watched on: activations that are read once, and what texts tell of them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float
from safetensors import safe_open

from nla_jax.evaluation.planted.task import Task
from nla_jax.evaluation.planted.tasks import tasks
from nla_jax.evaluation.text_probe import text_probe_accuracy
from nla_jax.files import local_copy
from nla_jax.lm.files.safetensors_files import save_tensors
from nla_jax.pipeline.run import Run
from nla_jax.pipeline.subject import target_of

ASKED, TAUGHT = 32, 64
"""Texts of each task that are asked about, and others that teach the probe; fewer than a final evaluation has, since
all of them are explained at every evaluation of joint training."""
FILE_NAME = "watched_tasks.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedTasks:
    """Activations of planted texts, task by task: those that teach a probe behind those that are asked about."""

    labels: tuple[tuple[str, ...], ...]
    """For each task, the labels of its ASKED and of its TAUGHT texts."""
    activations_ND: Float[np.ndarray, "N D"]

    def figures(self, texts: Sequence[str | None]) -> dict[str, float]:
        """What the words of explanations tell of the planted properties.

        Args:
          texts: the explanation of each activation.

        Returns:
          `text_probe`, the mean over tasks of the accuracy of a probe on words, and `text_probe_chance`, that of
          always giving the commonest label.
        """
        size = ASKED + TAUGHT
        cut = [texts[start : start + size] for start in range(0, len(texts), size)]
        accuracies = [
            text_probe_accuracy(of_task[:ASKED], labels[:ASKED], of_task[ASKED:], labels[ASKED:])
            for of_task, labels in zip(cut, self.labels, strict=True)
        ]
        commonest = [max(map(labels[:ASKED].count, set(labels[:ASKED]))) / ASKED for labels in self.labels]
        return {"text_probe": float(np.mean(accuracies)), "text_probe_chance": float(np.mean(commonest))}


def chosen_tasks(run: Run) -> list[Task]:
    """The tasks that `evaluation.monitor_tasks` names.

    Raises:
      ValueError: there is no such task for this target, or a task whose answers depend on what the target does.
    """
    names = run.config.evaluation.monitor_tasks
    if not names:
        return []
    known = {task.name: task for task in tasks(run.models.lm.tokenizer) if not task.behavior}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"evaluation.monitor_tasks names {', '.join(map(repr, unknown))}; with the target {run.models.lm.name} it "
            f"can name {', '.join(map(repr, known))}"
        )
    return [known[name] for name in names]


def watched_tasks(run: Run) -> WatchedTasks | None:
    """The activations of the chosen tasks' texts, from the run's data or read with the target; None without tasks."""
    chosen = chosen_tasks(run)
    if not chosen:
        return None
    seed = run.config.seed
    examples = [[*task.examples(ASKED, seed), *task.examples(TAUGHT, seed, teaching=True)] for task in chosen]
    contexts = [example.context for of_task in examples for example in of_task]
    labels = tuple(tuple(example.label for example in of_task) for of_task in examples)
    return WatchedTasks(labels, _activations(run, contexts))


def _activations(run: Run, contexts: Sequence[str]) -> Float[np.ndarray, "N D"]:
    path = run.directory / "data" / FILE_NAME
    identity = json.dumps([run.models.lm.name, run.config.model.layer, *contexts])
    digest = hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    if path.exists():
        with local_copy(path) as copy, safe_open(copy, "numpy") as file:
            if file.metadata()["digest"] == digest:
                return file.get_tensor("activations")
    activations_ND = target_of(run).activations(contexts)[:, 0]
    if jax.process_index() == 0:
        save_tensors({"activations": activations_ND}, path, {"digest": digest})
    return activations_ND
