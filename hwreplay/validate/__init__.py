"""A simulated run against the replayed one."""
