"""From documents to activations, explanations and batches."""
