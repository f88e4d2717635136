"""Measure an NLA on held-out documents, and write evaluation.json and report.html: `nla evaluate`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
