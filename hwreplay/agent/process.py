"""The agents' process: from their files to their end. See `voltana.hwreplay.agent.agent`."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Final

import zmq

from voltana.hwreplay.agent.agent import AgentConfig, read_agent_config, ready_file
from voltana.hwreplay.agent.listener import TICK_S, Agent
from voltana.hwreplay.messages.agent_reports import Reports
from voltana.hwreplay.view.context import PolicySource
from voltana.profiles.catalog import Profile, load_profile
from voltana.profiles.common.errors import VoltanaError
from voltana.sim.config import make_config
from voltana.sim.policies.base import DECODE, PREFILL

SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
RELOAD: Final = signal.SIGUSR1
"""Asks agents to read their files again; SIGHUP ends them, as a terminal that is gone does."""


def _make_source(configs: Sequence[AgentConfig], profile: Profile | None = None) -> PolicySource:
    """One for all agents of a process: they replay one configuration.

    A reload keeps the profile: another is refused, and what is made of one stays in memory.
    """
    settings = make_config(configs[0].settings, where=configs[0].name)
    for config in configs[1:]:
        if config.settings != configs[0].settings:
            raise VoltanaError(
                f"agents of one process must have the same settings, {config.name} has others than "
                f"{configs[0].name}: start it in a process of its own"
            )
    return PolicySource(config=settings, profile=profile or load_profile(settings.profile))


def _show_fleet(source: PolicySource, agents: Sequence[Agent]) -> None:
    """Fill the cluster; a controller that looks at it must see every instance."""
    cluster, config = source.cluster, source.config
    cluster.prefill = [a.state for a in agents if a.state.phase != DECODE]
    cluster.decode = [a.state for a in agents if a.state.phase != PREFILL]
    num_missing = sum(config.counts.values()) - len(agents)
    if cluster.is_observed and num_missing:
        raise VoltanaError(
            "a controller that sees the whole fleet needs the agents of all instances in one "
            f"process, {num_missing} are missing: `voltana replay` starts them so"
        )


def _on_signal(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def run_agents(paths: Sequence[Path], parent_pid: int) -> None:
    """Run the agents of JSON files until a signal or their parent's end.

    The clocks are given back, however this ends.

    Raises:
        VoltanaError: A wrong setting, or the actuator does not answer.
    """
    configs = [read_agent_config(path) for path in paths]
    run_configs(
        configs,
        paths[0].parent,
        lambda: os.getppid() == parent_pid,
        reread=lambda: [read_agent_config(path) for path in paths],
    )


def run_configs(
    configs: Sequence[AgentConfig],
    directory: Path,
    goes_on: Callable[[], bool],
    reports: Reports | None = None,
    reread: Callable[[], Sequence[AgentConfig]] | None = None,
) -> None:
    """Run agents in this process until a signal comes or `goes_on` says no.

    Args:
        configs: One an instance, of one simulated configuration.
        directory: Takes their files.
        goes_on: Asked at every turn.
        reports: As in `Agent`.
        reread: Asked for the configurations anew when the signal `RELOAD` has come.

    Raises:
        VoltanaError: A wrong setting, or the actuator does not answer.
        SystemExit: A signal came; 128 and its number.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup stays what it is
            signal.signal(signum, _on_signal)
    asked: list[int] = []
    if reread is not None:
        signal.signal(RELOAD, lambda number, frame: asked.append(number))
    source, poller = _make_source(configs), zmq.Poller()
    with ExitStack() as stack:
        agents: list[Agent] = []
        for config in configs:
            agents.append(Agent(config, directory, source, poller, reports))
            stack.callback(agents[-1].close)
        stack.callback(_ignore_signals)
        _show_fleet(source, agents)
        gc.collect()
        gc.freeze()
        for config in configs:
            ready_file(config, directory).touch()
        while goes_on():
            if asked and reread is not None:
                asked.clear()
                _reload(agents, reread, directory, source.profile)
            for agent in agents:
                agent.poll_actuator()
            poller.poll(int(TICK_S * 1e3))
            for agent in agents:
                agent.turn()


def _reload(
    agents: Sequence[Agent],
    reread: Callable[[], Sequence[AgentConfig]],
    directory: Path,
    profile: Profile,
) -> None:
    """Take over the policies of the files, or say why not and leave all as it is.

    Args:
        agents: Who runs.
        reread: Gives what the files say now.
        directory: Has a file for each agent that has taken its policy over.
        profile: Of them all.
    """
    try:
        configs = reread()
        source = _make_source(configs, profile)
        for agent in agents:
            agent.adopt(source)
        _show_fleet(source, agents)
    except VoltanaError as error:
        sys.stderr.write(f"voltana agent: the old policy stays: {error}\n")
        return
    for config in configs:
        ready_file(config, directory).touch()


def _ignore_signals() -> None:
    """A second one must not stop the giving back."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def main(arguments: Sequence[str]) -> int:
    """Run agents. Arguments: the process they must not outlive, their JSON files."""
    parent, *files = arguments
    try:
        run_agents([Path(file) for file in files], int(parent))
    except VoltanaError as error:
        sys.stderr.write(f"voltana agent: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
