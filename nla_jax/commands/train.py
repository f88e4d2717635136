"""Train, measure and report an NLA: all stages in order."""

from nla_jax.commands import experiment


def main(arguments: list[str]) -> None:
    """Run all stages of an experiment, as `nla train CONFIG ...` says."""
    experiment.run(arguments, program="nla train", description=__doc__)
