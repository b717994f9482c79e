"""Tests of `profiles.device`."""
