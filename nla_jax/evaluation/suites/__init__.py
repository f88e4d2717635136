"""The suites of an evaluation, each a module with `measure(subject) -> tables`; see `evaluation.measure`."""
