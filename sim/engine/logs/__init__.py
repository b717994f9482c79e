"""What a run reports while it goes on: exactly, in bounded memory, as time series."""
