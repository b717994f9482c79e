"""What is chosen, on the tuning repeats: fixed clocks, power caps, a dynamic policy."""
