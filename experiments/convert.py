"""Export AV and AR of a run in the reference project's layout: `nla convert`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
