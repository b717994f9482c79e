"""What a profile may have beside the tables of its two phases."""
