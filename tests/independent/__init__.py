"""A second simulator, written from the documents alone: no code of `voltana.sim.engine`."""
