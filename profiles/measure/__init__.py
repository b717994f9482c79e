"""How a grid of (clock, batch, tokens) becomes measured time and power."""
