"""Routing as a Markov decision process: its state grid and the files of its policies."""
