"""Frequency controllers, one rule a file."""
