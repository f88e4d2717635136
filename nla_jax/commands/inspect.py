"""Show what the checkpoints of a run hold, its documents and how its texts changed, and check that it can be read."""

import argparse
from typing import TYPE_CHECKING

from nla_jax.commands import aligned, path_argument, plain_errors

if TYPE_CHECKING:
    from nla_jax.files import AnyPath
    from nla_jax.training.checkpoint_files import Description


def main(arguments: list[str]) -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(prog="nla inspect", description=__doc__)
    parser.add_argument(
        "directory", type=path_argument, help="of a run, of one of its stages, or a checkpoint"
    )
    parser.add_argument("--leaves", action="store_true", help="list every array")
    parser.add_argument(
        "--verify", action="store_true", help="read everything and compare it with what was saved"
    )
    parser.add_argument(
        "--texts", action="store_true", help="print how the texts that are watched changed in joint training"
    )
    args = parser.parse_args(arguments)
    # Takes seconds, and the help needs none of it.
    from nla_jax.pipeline.documents import read_record
    from nla_jax.training.checkpoint_files import describe, verify

    with plain_errors():
        found = describe(args.directory)
        print(table(found))
        if record := read_record(args.directory):
            print(f"\n{record.documents} documents of {record.corpus}, digest {record.digest}")
        if args.texts:
            print(f"\n{_texts(args.directory)}")
        for description in found:
            if args.leaves:
                print(f"\n{description.path}\n{leaves(description)}")
            if args.verify:
                verify(description)
                print(f"{description.path}: every number is as it was saved")


def _texts(directory: "AnyPath") -> str:
    from nla_jax.evaluation.history import as_text, read_history

    history = read_history(directory)
    if not history:
        raise ValueError(
            f"{directory} holds no texts of joint training (history.jsonl); give the directory of a run whose stage rl "
            "has begun"
        )
    return as_text(history)


def table(found: list["Description"]) -> str:
    """One line for each tree of each checkpoint."""
    lines = [
        ("stage", "step", "kept as best", "tree", "arrays", "params MB", "optimizer MB", "config digest")
    ]
    for description in found:
        for tree, held in description.trees.items():
            lines.append(
                (
                    description.path.parent.name,
                    str(description.step),
                    "yes" if description.pinned else "",
                    tree,
                    str(len(held)),
                    f"{description.bytes_of(tree, 'params') / 1e6:.1f}",
                    f"{description.bytes_of(tree, 'opt_state') / 1e6:.1f}",
                    description.digest,
                )
            )
    return aligned(lines)


def leaves(description: "Description") -> str:
    """One line for each array."""
    return "\n".join(
        f"  {tree}/{path}: {leaf.dtype} {leaf.shape}"
        for tree, held in description.trees.items()
        for path, leaf in held.items()
    )
