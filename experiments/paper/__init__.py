"""The published main result beside ours."""
