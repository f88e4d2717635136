"""Writers of warm-start explanations, behind one protocol."""
