"""Language models as files: where they come from, how their tensors are named, and how they are read and written."""
