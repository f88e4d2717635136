"""Natural Language Autoencoders: explain a language model's activations in plain text, and check the text."""
