"""Warm-start the AR on the explanations; its last checkpoint is the frozen judge: `nla stage ar_sft`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "ar_sft", *sys.argv[1:]])
