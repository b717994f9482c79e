"""Requests that belong together: prompts that share what they begin with, turns that wait."""
