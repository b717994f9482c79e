"""Profiles made from public kernel tables, power coefficients and clock shapes, without a GPU."""
