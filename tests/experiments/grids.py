"""A sweep file of two policies, which several tests run."""

TWO_POLICIES = """
[base]
duration_s = {duration}
[grid]
rate_rps = {rates}
[[grid.policy]]
name = "static-max"
controller = "static"
router = "round-robin"
[[grid.policy]]
name = "ecofreq"
controller = "ecofreq"
"""
