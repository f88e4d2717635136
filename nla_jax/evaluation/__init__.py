"""How well explanations carry activations: round trips, controls, and the report."""
