"""Tests of `profiles.measure`."""
