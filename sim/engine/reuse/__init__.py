"""Prompts that share tokens, and sessions whose turns wait for answers: off unless asked for."""
