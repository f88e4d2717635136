"""Using a trained NLA: explain a text, compare activations."""
