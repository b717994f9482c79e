"""Tests of `voltana.profiles.engines`."""
