"""Routing as a Markov decision process, in one room.

- What serves: `grid` (states), `observation` (what a network sees), `policy_file`, and `router`,
  the policy `mdp`. The list of policies imports the router and nothing else of this room.
- What solves: `model` (one instance as a chain, built from a profile), `clock_rule` (the clock that
  a controller sets in each state), `solve` (exact), `factored` (many instances).
- What learns on the simulator: the folder `learn`, the only part that imports `voltana.sim.engine`.
"""
