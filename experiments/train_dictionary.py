"""Train a sparse dictionary on the activations of a run: `nla data dictionary`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["data", "dictionary", *sys.argv[1:]])
