"""Questions that the simulator answers: experiments, gains, trained policies."""
