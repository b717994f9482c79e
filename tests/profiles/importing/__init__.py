"""Tests of `voltana.profiles.importing`."""
