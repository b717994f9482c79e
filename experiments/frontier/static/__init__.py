"""The best static fleet: of like cards within a phase, or of unlike ones."""
