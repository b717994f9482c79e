"""Scalers: how many instances serve, what the others do meanwhile, and at which base clock."""
