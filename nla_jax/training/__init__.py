"""Pure jitted training steps and the loops around them."""
