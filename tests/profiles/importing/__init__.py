"""Tests of `profiles.importing`."""
