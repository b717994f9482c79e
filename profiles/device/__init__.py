"""One GPU: what can be read from it, what can be set, and how that is put back."""
