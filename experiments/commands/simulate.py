"""`voltana simulate`: one run of one policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from voltana.experiments.options import (
    AsJson,
    complete_controller,
    complete_profile,
    complete_router,
    complete_setting,
    complete_trace,
    complete_workload,
)
from voltana.profiles.common.binding import parse_settings
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.places import SERVING, read_serving
from voltana.sim.config import KEYS, SimConfig, make_config, read_toml
from voltana.sim.workload.generate import PART_REQUESTS
from voltana.sim.workload.workload import Workload

_SET_HELP = "Set any configuration key, repeatable; the keys are listed below"
_WIDTH = max(len(key) for key in KEYS)
_KEYS_HELP = "\b\nKeys of --set, of TOML files and of sweeps:\n" + "\n".join(
    f"  {key:<{_WIDTH}}  {text}" for key, text in KEYS.items()
)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "simulate",
        short_help="One configuration: its energy, latency, attainment",
        epilog=_KEYS_HELP,
    )(simulate)


def simulate(
    config: Annotated[
        Path | None, typer.Option(help="TOML file of configuration keys; options override it")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="Profile name or directory", autocompletion=complete_profile),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help="Length distribution by name, or a file of lengths",
            autocompletion=complete_workload,
        ),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Trace file or named trace, in place of a workload", autocompletion=complete_trace
        ),
    ] = None,
    trace_unit: Annotated[
        str | None, typer.Option(help="Of a trace's arrival numbers: s, ms, us or ns")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Mean arrival rate, requests/s")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds of arrivals")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of arrivals, lengths, policies")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill instances")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode instances")] = None,
    colocated: Annotated[
        int | None, typer.Option(help="Instances that do both phases, in place of those of each")
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option(
            help="Frequency controller, e.g. ecofreq:margin=0.1",
            autocompletion=complete_controller,
        ),
    ] = None,
    prefill_controller: Annotated[
        str | None, typer.Option(help="Of prefill only", autocompletion=complete_controller)
    ] = None,
    decode_controller: Annotated[
        str | None, typer.Option(help="Of decode only", autocompletion=complete_controller)
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="Router, e.g. ecoroute:tile=64", autocompletion=complete_router),
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option(help="Promised TTFT, ms")] = None,
    slo_itl_ms: Annotated[float | None, typer.Option(help="Promised ITL, ms")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help=_SET_HELP, autocompletion=complete_setting),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the run directory here")] = None,
    spill: Annotated[
        Path | None,
        typer.Option(help="With metrics=sketch: a parquet file, one row a request as it ends"),
    ] = None,
    json: AsJson = False,
    uncertainty: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compare with static-max under the same router on so many draws from the profile's"
            " stated errors",
        ),
    ] = None,
    require_slo: Annotated[
        bool,
        typer.Option("--require-slo", help="Exit with 1 if TTFT or ITL attainment is below 99 %"),
    ] = False,
) -> None:
    """Simulate one configuration and print its energy, latency and attainment.

    If it misses its promise and top clocks would too, a line on standard error says so.

    A run too long to keep (ten million requests take minutes): --set metrics=sketch, with
    --set arrivals=diurnal for a day that is drawn as it is simulated.

    Example: voltana simulate --workload sharegpt --rate 36 --controller ecofreq --router ecoroute
    """
    options: dict[str, Any] = {
        "profile": profile, "workload": workload, "trace": trace, "trace_unit": trace_unit,
        "rate_rps": rate,
        "duration_s": duration, "seed": seed, "num_prefill": prefill, "num_decode": decode,
        "num_colocated": colocated,
        "controller": controller, "prefill_controller": prefill_controller,
        "decode_controller": decode_controller, "router": router,
        "slo_ttft_s": None if slo_ttft_ms is None else slo_ttft_ms * 1e-3,
        "slo_itl_s": None if slo_itl_ms is None else slo_itl_ms * 1e-3,
    }  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    given |= parse_settings(settings or [])
    values = (_read(config) if config else {}) | given
    _require_used(values, given)
    _run(
        make_config(values, where=str(config) if config else "command line"),
        out,
        spill,
        uncertainty,
        as_json=json,
        requires_slo=require_slo,
    )


def _require_used(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """A trace has its own arrivals and lengths: refuse those that were asked for beside it."""
    if values.get("trace") in (None, "none"):
        return
    for key in ("workload", "rate_rps", "arrivals"):
        if key in given:
            raise VoltanaError(
                f"{key} is of generated requests and a trace has its own, got {key}={given[key]} "
                f"and trace={values['trace']}: leave one out; time_scale=2 plays a trace twice as "
                "fast, and as a workload a trace file lends its lengths"
            )


def _read(path: Path) -> dict[str, Any]:
    """A configuration; a profile's serving.toml stands for its profile."""
    if path.name != SERVING:
        return read_toml(path)
    read_serving(path)
    return {"profile": str(path.parent)}


def _run(
    config: SimConfig, out: Path | None, spill: Path | None, draws: int | None, *, as_json: bool,
    requires_slo: bool,
) -> None:  # fmt: skip
    from voltana.experiments.compare.draws import against_static_max, require_drawable
    from voltana.experiments.compare.policies import keeps_promise
    from voltana.experiments.promise import missed, overload_of, tell
    from voltana.experiments.runs import run
    from voltana.experiments.show import summary_json, summary_table
    from voltana.sim.metrics import summarise
    from voltana.sim.results import refuse_existing, write_run

    if out is not None:
        refuse_existing(out)
    if spill is not None and spill.exists():
        raise VoltanaError(f"{spill} is there already: name another file")
    if spill is not None:
        spill.parent.mkdir(parents=True, exist_ok=True)
    if draws is not None:
        require_drawable(config)
    record = run(config, spill=spill, watch=_watch(config))
    summary = summarise(record) if out is None else write_run(record, out)
    drawn = None if draws is None else against_static_max(config, draws)
    if as_json:
        more = {} if drawn is None else {"against_static_max": drawn.as_dict()}
        typer.echo(summary_json({**summary, **more}))
    else:
        typer.echo(summary_table(config, summary))
        if drawn is not None:
            typer.echo(drawn.text("static-max"))
    overload = overload_of(config, summary)
    tell([] if overload is None else [overload])
    if requires_slo and not keeps_promise(summary):
        raise missed("the run misses its promise")


def _watch(config: SimConfig) -> Callable[[Iterator[Workload]], Iterator[Workload]]:
    """A bar of the requests that have arrived, where a workload comes part by part."""
    from voltana.experiments.progress import progress_bar
    from voltana.experiments.runs import DEFAULT_DURATION_S

    expected = config.rate_rps * (config.duration_s or DEFAULT_DURATION_S)

    def watched(parts: Iterator[Workload]) -> Iterator[Workload]:
        with progress_bar("simulating", -(-expected // PART_REQUESTS)) as bar:
            for part in parts:
                yield part
                bar.advance()

    return watched
