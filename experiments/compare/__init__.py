"""Fair comparison of policies and of profiles."""
