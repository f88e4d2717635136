"""Models and data sets of the reference implementation, read and written: see docs/interop.md."""
