"""Whose energy it was: what a meter has counted, shared among the requests that were served.

`shares` divides one instance's energy, `bills` adds up a request's over the instances it was at.
"""
