"""The contest: every shipped load, its table, its page, and where the bound leaves room."""
