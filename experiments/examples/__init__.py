"""A controller and a router of your own, to start from."""
