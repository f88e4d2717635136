"""Extract activations of the target LM at sampled positions of the corpus: `nla stage extract`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "extract", *sys.argv[1:]])
