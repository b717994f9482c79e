"""The agent of one instance: listens, asks its controller, sets the clock."""
