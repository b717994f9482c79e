"""What iterations take, how they vary, and where energy is added."""
