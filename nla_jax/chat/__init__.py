"""Chat models behind one protocol: models behind APIs, and language models of our own."""
