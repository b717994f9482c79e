"""Command line, sweeps and figures."""
