"""What the documentation and the notebooks are made with."""
