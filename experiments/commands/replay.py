"""`voltana replay`: a simulated configuration on real engines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.extras import needs
from voltana.experiments.options import AsJson


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("replay", short_help="Play a configuration on SGLang servers")(replay)


def replay(
    config: Annotated[
        Path, typer.Option(help="TOML file: [simulate], [fleet], [router] and [replay]")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to write")],
    finish: Annotated[
        bool, typer.Option("--finish", help="Only write the results of a replay that was killed")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="Measure only what serving adds to a first token, idle and busy; OUT/simulate.toml"
            " is the configuration with it, for simulate",
        ),
    ] = False,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="With --probe: fit iteration times as well, to a profile in OUT/profile"
        ),
    ] = False,
    json: AsJson = False,
) -> None:
    """Replay a configuration on SGLang prefill and decode servers.

    The workload, the router and the controllers are those of `voltana simulate` with the same
    [simulate] keys, and so are the files that it writes: compare them with `voltana validate`.
    [fleet] starts servers (engine = ".engine") or lists running ones. Without [replay] actuator
    the clocks are left alone and decisions are recorded. Ctrl-C, SIGTERM and SIGHUP keep what has
    ended and exit with 1; servers that were started here end with this command, however it ends.

    With [replay] emulate the cards are emulated from a profile, and dilation slows all clocks.

    A simulation knows iterations only: `--probe` first measures what HTTP, routing and the
    hand-over add, and writes a configuration that has it.

    Example: voltana replay --config replay.toml --out results/replayed
    """
    with needs("replay", "voltana replay"):
        from voltana.experiments.hardware.replay import enter_time, run_probe, run_replay
    from voltana.experiments.show import print_result, summary_table

    enter_time(config)
    if probe:
        overhead, adjusted = run_probe(config, out, fits_profile=fit)
        latency_s = adjusted.kv_transfer_latency_s
        print_result(
            {**asdict(overhead), "kv_transfer_latency_s": latency_s},
            f"a first token takes {overhead.idle_s * 1e3:.1f} ms beyond its iterations on idle"
            f" servers, {overhead.busy_s * 1e3:.1f} ms beside a running stream;"
            f" kv_transfer_latency_s = {latency_s} in {out}/simulate.toml",
            as_json=json,
        )
        return
    made, summary = run_replay(config, out, only_finish=finish)
    print_result(summary, summary_table(made.sim, summary), as_json=json)
    if not finish:
        _check_complete(out)


def _check_complete(out: Path) -> None:
    """Exit with 1 if the run was cut off or lost a part on its way."""
    from voltana.sim.results import read_json

    settings = read_json(out / "settings.json")
    if not settings["is_complete"]:
        typer.echo(
            f"voltana: the replay is incomplete, {settings['incomplete_reason']}: what had ended is"
            f" in {out}",
            err=True,
        )
        raise typer.Exit(1)
