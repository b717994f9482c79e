"""Emulated cards: an NVML whose silicon is modelled from a profile, everything above it is real.

    actuator, watchdog, agents, meters ── pynvml ── libnvidia-ml.so.1 (nvml.c) ──┐
    engine's plug-in ── card.py ── the same library (card.c) ────────────────────┤
    faults, tests ── card.py ────────────────────────────────────────────────────┴─ one mapped file

`build` compiles the library, `state` makes the file from a profile.
"""
