"""Requests: readers of published traces, generators, length histograms."""
