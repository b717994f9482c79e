"""`voltana profile import`: a profile from public kernel tables, without a GPU."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson


def import_profile(
    system: Annotated[
        str, typer.Option(help="Card by its name in the tables: h100_sxm, h200_sxm, b200_sxm, …")
    ],
    model: Annotated[
        str, typer.Option(help="config.json, its folder, or a name that the wheel knows")
    ],
    out: Annotated[Path, typer.Option(help="Profile directory")],
    tp: Annotated[int, typer.Option(help="GPUs of an instance, 1 to 8")] = 1,
    engine: Annotated[str, typer.Option(help="sglang, vllm or trtllm")] = "sglang",
    version: Annotated[
        str | None, typer.Option(help="Of the engine; the newest with tables if not given")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="Folder of tables, instead of the installed wheel")
    ] = None,
    power_from: Annotated[
        str | None, typer.Option(help="h100, b200, rtx-pro-6000 or a TOML file; none: no energy")
    ] = None,
    clock_shape: Annotated[
        str | None, typer.Option(help="a100, rtx-pro-6000 or a TOML file; none: one clock")
    ] = None,
    json: AsJson = False,
) -> None:
    """Import a profile from NVIDIA's aiconfigurator tables of kernel times.

    The tables are those of the wheel aiconfigurator-core (`pip install 'voltana[tables]'`), or of a
    folder. They hold times at the default clock; power and the dependence on clocks come from
    elsewhere and are named. Without --clock-shape the profile has one clock, and policies that
    choose clocks refuse it. Models: dense Llama-like ones, and mixtures of experts that the tables
    have.

    Example: voltana profile import --system h100_sxm --model Qwen/Qwen3-8B --power-from h100
    --clock-shape a100 --out results/profiles/h100-qwen3-8b
    """
    from voltana.experiments.hardware.profiling import check_out
    from voltana.experiments.show import print_result
    from voltana.profiles.importing.build import Source, build_profile
    from voltana.profiles.importing.decoder import load_decoder
    from voltana.profiles.importing.power import load_clock_shape, load_power
    from voltana.profiles.importing.systems import load_system
    from voltana.profiles.importing.tables import open_tables

    check_out(out)
    found = open_tables(load_system(system), engine, version, tables)
    source = Source(
        tables=found,
        decoder=load_decoder(model, tp, tables),
        power=load_power(power_from) if power_from else None,
        clocks=load_clock_shape(clock_shape) if clock_shape else None,
    )
    made = build_profile(source, out)
    told = {
        "profile": str(out),
        "gpu": made.meta.gpu.name,
        "model": made.meta.model.name,
        "tensor_parallel": tp,
        "engine": f"{found.engine} {found.version}",
        "prefill_rows": len(made.prefill),
        "decode_rows": len(made.decode),
        "provenance": {key: asdict(entry) for key, entry in made.meta.provenance.items()},
    }
    print_result(
        told,
        f"{out}: {made.meta.gpu.name}, {made.meta.model.name}, TP{tp}, {found.engine} "
        f"{found.version}, {len(made.prefill)} prefill and {len(made.decode)} decode rows",
        *(
            f"  {key}: {entry.status}" + (f", {entry.uncertainty}" * bool(entry.uncertainty))
            for key, entry in made.meta.provenance.items()
        ),
        as_json=json,
    )
