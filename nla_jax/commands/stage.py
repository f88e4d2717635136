"""Run one stage of an experiment, which reads what the stages before it left in the run directory."""

import sys

from nla_jax.commands import experiment, plain_errors
from nla_jax.files import as_path
from nla_jax.shipped import shipped_configs

STAGES = {
    "extract": "Extract activations of the target LM at sampled positions of the corpus.",
    "explain": "Write warm-start explanations and split the rows by document.",
    "av_sft": "Warm-start the AV on the explanations; its best step is the reference of RL.",
    "ar_sft": "Warm-start the AR on the explanations; its best step is the frozen judge.",
    "distill": "Fine-tune the AV on the best of its own explanations, where distill.loop.steps asks for it.",
    "rl": "Train AV and AR jointly with GRPO.",
    "evaluate": "Measure the NLA on held-out documents.",
    "report": "Write the HTML report of a run.",
}
"""The stages in order, each with its help."""

_USAGE = f"""usage: nla stage NAME CONFIG [--run-dir DIR] [--FIELD VALUE ...]

{__doc__ or ""}

NAME is one of these; they take the arguments of `nla train`, which runs all of them:
{chr(10).join(f"  {name:9} {line}" for name, line in STAGES.items())}

`nla stage NAME --help` tells more."""


def main(arguments: list[str]) -> None:
    """Run the stage that the first argument names, as `nla stage NAME CONFIG ...` says."""
    name, *rest = arguments or [""]
    if name in ("-h", "--help"):
        print(_USAGE)
        return
    if name not in STAGES:
        known = f"nla stage: there is no stage {name!r}\n\n" if name else ""
        print(known + _USAGE, file=sys.stderr)
        raise SystemExit(2)
    with plain_errors():
        is_other = name == "explain" and rest and not _may_be_config(rest[0])
    if is_other:
        raise SystemExit(
            f"error: there is no config {rest[0]!r}. This stage of a training run writes warm-start texts; to explain "
            "a text with a trained NLA: `nla explain DIRECTORY TEXT` (verbalize.py among the scripts)"
        )
    experiment.run(rest, stages=(name,), program=f"nla stage {name}", description=STAGES[name])


def _may_be_config(argument: str) -> bool:
    """Whether an argument is an option, a shipped config, a path that exists, or looks like a file of Python."""
    if argument.startswith("-") or argument in shipped_configs():
        return True
    return argument.endswith(".py") or as_path(argument).exists()
