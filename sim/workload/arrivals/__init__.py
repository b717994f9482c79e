"""When requests arrive: processes by name, recorded rates."""
