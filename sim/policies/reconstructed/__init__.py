"""Rivals rebuilt from an idea: the constants that decide are ours, as their sources give none.

What they score says what the idea does here with our numbers, and nothing of the source. They are
listed as *invented*, and stand in no headline table. Ours are, of

- `miad`: every constant, the quantile, and the floor of its clocks;
- `greenllm`: slack, bins and band of decode, the window of the arrival rate, its queue formula;
- `length-split`: the length that parts short from long prompts, and the share of the instances;
- `kairos`: the straight line from KV use to clock, and for how long the top clock is held;
- `rapid`: step, pressure, slack, queue length, and the first split of the budget.
"""
