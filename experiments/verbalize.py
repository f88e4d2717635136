"""Explain the activations of a text with a trained NLA, token by token: `nla explain`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["explain", *sys.argv[1:]])
