"""Replay of a policy on a fleet of real engines."""
