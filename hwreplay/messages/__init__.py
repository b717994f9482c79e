"""What the processes tell each other: every wire format."""
