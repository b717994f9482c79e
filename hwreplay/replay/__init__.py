"""A workload played on a real fleet, and the record of it."""
