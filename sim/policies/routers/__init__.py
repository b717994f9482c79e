"""Routers, one rule a file."""
