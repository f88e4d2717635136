"""Write warm-start explanations and split the rows by document."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "explain")
