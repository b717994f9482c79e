"""The least energy that any policy could reach."""
