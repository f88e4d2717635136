"""Warm-start the AV on the explanations; its last checkpoint is the reference of RL: `nla stage av_sft`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "av_sft", *sys.argv[1:]])
