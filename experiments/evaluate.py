"""Measure an NLA on held-out documents: `evaluate.py RUN --suite all`, and write evaluation.json and report.html.

--suite names suites (reconstruction controls prediction faithfulness degeneracy cost sanity), or is `all`.
"""

import sys

from nla_jax.cli import main

if __name__ == "__main__":
    sys.argv = ["--evaluation.suites" if argument == "--suite" else argument for argument in sys.argv]
    main(("evaluate", "report"), __doc__)
