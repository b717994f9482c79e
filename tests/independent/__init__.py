"""A second simulator, written from the documents alone; it shares no code with `sim.engine`."""
