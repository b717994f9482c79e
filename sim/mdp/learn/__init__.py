"""Solving and learning the routing MDP: exact, factored, tabular, on the simulator itself."""
