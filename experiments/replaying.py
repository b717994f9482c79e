"""From a replay's file to a finished run directory, with progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.runs import workload_of
from hwreplay.replay import finish, replay
from hwreplay.replay_config import ReplayConfig, read_replay_config
from sim.results import refuse_existing, write_run


def run_replay(
    path: Path, out: Path, *, only_finish: bool = False
) -> tuple[ReplayConfig, dict[str, Any]]:
    """Replay the configuration in a file, write the run directory, return config and summary.

    Args:
        path: TOML file, see `hwreplay.replay_config`.
        out: Run directory; may hold no run.
        only_finish: Send nothing: write the results of what an earlier replay left there.

    Raises:
        VoltanaError: A wrong configuration, or a part of the fleet that does not start.
    """
    config = read_replay_config(path)
    refuse_existing(out)
    workload = workload_of(config.sim)
    if only_finish:
        return config, write_run(finish(config, workload, out), out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("replay", total=len(workload))

        def show(stage: str, ended: int) -> None:
            progress.update(task, description=stage, advance=ended)

        record = replay(config, workload, out, show)
    return config, write_run(record, out)
