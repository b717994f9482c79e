"""Controllers seen as control: step responses, the plant, gains."""
