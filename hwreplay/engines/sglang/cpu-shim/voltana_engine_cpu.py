"""SGLang plug-in (entry point group `sglang.srt.plugins`): disaggregation on host memory.

Three things upstream takes from a GPU and a CPU engine lacks: a timing event for the forward-pass
metrics, one for the early send of a cached prefix, and pinned memory for a fast path of the
Mooncake sender. Active only with SGLANG_USE_CPU_ENGINE=1.
"""

from __future__ import annotations

import os
import time


class HostEvent:
    """Stand-in for a device event: the work it would wait for is already done."""

    def __init__(self, enable_timing: bool = False, **_options: object) -> None:
        self.recorded_s = 0.0

    def record(self, stream: object = None) -> None:
        self.recorded_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return

    def wait(self, stream: object = None) -> None:
        return

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds, as torch's events count."""
        return (end.recorded_s - self.recorded_s) * 1e3


def register() -> None:
    """Called by SGLang in each of its processes."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    import torch
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    torch.cpu.Event = HostEvent
    torch.cuda.Event = HostEvent
    MooncakeKVSender.supports_host_tensor_indices = False
