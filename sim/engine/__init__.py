"""The only code that knows SimPy."""
