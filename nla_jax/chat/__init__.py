"""Chat models behind one protocol: models behind APIs, and language models that are loaded here."""
