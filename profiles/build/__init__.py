"""Builders of the profiles that are calibrated from published measurements."""
