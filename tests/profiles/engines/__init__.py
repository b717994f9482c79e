"""Tests of `profiles.engines`."""
