"""Everything that touches one GPU or one engine, and the tables measured on it."""
