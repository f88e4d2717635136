"""Explain the activations of a text with a trained NLA, token by token."""

import argparse
import json
from pathlib import Path

from nla_jax.analysis.explain import Explainer, as_records
from nla_jax.cli import use_compilation_cache
from nla_jax.config import read_config
from nla_jax.run import Run


def main() -> None:
    """Parse the command line, explain, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory, for instance runs/smollm2_135m_cpu")
    parser.add_argument("text", help="any text")
    parser.add_argument(
        "--position", type=int, action="append", help="token index (repeatable; -1 is the last)"
    )
    parser.add_argument("--samples", type=int, default=1, help="explanations a position")
    parser.add_argument("--temperature", type=float, help="default: 0, or 1 with several samples")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    temperature = float(args.samples > 1) if args.temperature is None else args.temperature
    try:
        use_compilation_cache()
        explainer = Explainer(Run(read_config(args.run / "config.json"), args.run))
        found = explainer.explain(args.text, args.position, samples=args.samples, temperature=temperature)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    if args.json:
        print(json.dumps(as_records(found), indent=1, ensure_ascii=False))
        return
    for item in found:
        print(f"{item.position:4d} {item.token!r}  cosine {item.cosine:.3f}  fve {item.fve_nrm:+.3f}")
        print(f"     {item.explanation or '(no closed explanation)'}")


if __name__ == "__main__":
    main()
