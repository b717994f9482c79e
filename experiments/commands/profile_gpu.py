"""`voltana profile`: measure a GPU and an engine into a profile directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from voltana.experiments.options import AsJson


def profile(
    model: Annotated[str, typer.Option(help="Built-in shape (llama-3.1-8b, toy) or a config.json")],
    out: Annotated[Path, typer.Option(help="Profile directory; the same one resumes a run")],
    gpu: Annotated[
        str, typer.Option(help="NVML indices of all the cards of the engine: 0, or 0,1 for two")
    ] = "0",
    engine: Annotated[str, typer.Option(help="torch or sglang")] = "torch",
    frequencies: Annotated[
        str, typer.Option(help="MHz list (1005,1200,1410), all, or current: touch no clock")
    ] = "current",
    phases: Annotated[
        str, typer.Option(help="prefill,decode, one of them, or mixed beside both")
    ] = "prefill,decode",
    budget: Annotated[str, typer.Option(help="Time for the points, e.g. 90s, 60m, 2h")] = "60m",
    device: Annotated[str, typer.Option(help="Where the engine computes: cuda or cpu")] = "cuda",
    dtype: Annotated[str, typer.Option(help="Type of weights and KV cache")] = "bfloat16",
    power_w: Annotated[
        float | None,
        typer.Option(help="No card: take this constant power, stated as modelled, never measured"),
    ] = None,
    window: Annotated[float, typer.Option(help="Shortest window of a trial, s")] = 2.0,
    iterations: Annotated[int, typer.Option(help="Fewest iterations of a trial")] = 32,
    warm_up: Annotated[float, typer.Option(help="Shortest warm-up of a point, s")] = 1.0,
    settle: Annotated[float, typer.Option(help="Rest before idle power is measured, s")] = 3.0,
    trials: Annotated[int, typer.Option(help="Phase-shifted trials of a point")] = 3,
    max_batch: Annotated[int, typer.Option(help="Largest decode batch")] = 1024,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a point")] = 10_000_000,
    attach: Annotated[
        Path | None,
        typer.Option(
            help="sglang: TOML file naming servers that run already, as for replay; on a GPU they "
            "are on the card, so add --allow-shared"
        ),
    ] = None,
    pair: Annotated[
        bool, typer.Option("--pair", help="sglang: start prefill and decode apart, not one server")
    ] = False,
    server_python: Annotated[
        Path, typer.Option(help="sglang: Python of the environment SGLang is installed in")
    ] = Path(sys.executable),
    server_args: Annotated[str, typer.Option(help="sglang: further arguments of a server")] = "",
    allow_shared: Annotated[
        bool, typer.Option("--allow-shared", help="Go on although others use the card")
    ] = False,
    restore_clock: Annotated[
        int | None,
        typer.Option(help="MHz to lock again at the end; without it the driver has the clock"),
    ] = None,
    json: AsJson = False,
) -> None:
    """Measure iteration time and power against batch size and tokens, at each clock.

    On a machine with a GPU, without any privilege (no clock is touched, the profile has one):

        voltana profile --gpu 0 --engine torch --model llama-3.1-8b --frequencies current --out h200

    With clock control (root), several clocks; the driver has them back on exit, Ctrl-C and kill -9
    (or --restore-clock MHZ, where one was locked before):

        sudo voltana profile --model llama-3.1-8b --frequencies 1005,1200,1410 --out a100

    SGLang, started here (or running already: --attach FILE); times come from its own metrics, and
    OUT/serving.toml holds what a request spends outside the iterations:

        voltana profile --engine sglang --model DIR --frequencies current --out h200

    The real SGLang on a CPU (`make engine`), prefill and decode apart, the power a stated constant:

        voltana profile --engine sglang --pair --device cpu --power-w 100 --out cpu
        --server-python .engine/venv/bin/python --model .engine/model --budget 3m --window 0.2

    Without a GPU, to see it work:

        voltana profile --model toy --device cpu --dtype float32 --power-w 100 --budget 60s
        --window 0.1 --trials 1 --max-batch 16 --max-tokens 4096 --out toy

    Every finished point is kept in OUT/journal.jsonl; run the same command again to go on.
    """
    from voltana.experiments.hardware.profiling import Wish, as_dict, run, summary
    from voltana.experiments.show import print_result
    from voltana.profiles.measure.trial import Protocol

    wish = Wish(
        model=model,
        out=out,
        cards=gpu,
        engine=engine,
        frequencies=frequencies,
        phases=phases,
        budget=budget,
        device=device,
        dtype=dtype,
        power_w=power_w,
        max_batch_size=max_batch,
        max_tokens=max_tokens,
        attach=attach,
        is_pair=pair,
        server_python=server_python,
        server_args=server_args,
        allows_shared=allow_shared,
        restored_clock_mhz=restore_clock,
        protocol=Protocol(
            window_s=window,
            min_iterations=iterations,
            num_trials=trials,
            warm_up_s=warm_up,
            settle_s=settle,
        ),
    )
    made = run(wish)
    print_result(as_dict(made, out), summary(made, out), as_json=json)
