"""Simulator, and every decision that simulator and hardware share."""
