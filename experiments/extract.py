"""Extract activations of the target LM at sampled positions of the corpus."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "extract")
