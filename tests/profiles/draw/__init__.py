"""Tests of `voltana.profiles.device`."""
