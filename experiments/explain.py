"""Write warm-start explanations and split the rows by document: `nla stage explain`.

To explain a text with a trained NLA: verbalize.py.
"""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "explain", *sys.argv[1:]])
