"""Tests of `voltana.profiles.measure`."""
