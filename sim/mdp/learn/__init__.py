"""Learning the routing MDP on the simulator: Q-learning, and a gymnasium environment for others."""
