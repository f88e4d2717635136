"""Language models: one functional Flax transformer for every family, its files, tokenizers, adapters and sampler."""
