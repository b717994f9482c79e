"""What a policy sees of real engines: each instance's state, kept true by what is heard of it."""
