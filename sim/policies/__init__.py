"""Frequency controllers and routers: state in, decision out."""
