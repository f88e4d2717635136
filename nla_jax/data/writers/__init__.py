"""Writers of the texts that warm starts learn from."""
