"""Energy at equal attainment, and the bound below it."""
