"""Figures: how all of them look, and those of a profile."""
