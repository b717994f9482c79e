"""Measuring cards, replays and their validation, as the command line runs them."""
