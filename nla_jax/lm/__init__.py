"""The target transformer: a functional Flax port, its weights, its tokenizer and its sampler."""
