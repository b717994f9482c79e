"""Build the shipped profiles of cards without a measurement.

    python -m voltana.profiles.importing.ship

Each is what `voltana profile import` makes of the installed wheel; their commands are printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from voltana.profiles.importing.build import Source, build_profile
from voltana.profiles.importing.decoder import load_decoder
from voltana.profiles.importing.power import load_clock_shape, load_power
from voltana.profiles.importing.systems import load_system
from voltana.profiles.importing.tables import open_tables
from voltana.profiles.places import DATA

ENGINE: Final = ("sglang", "0.5.14")
LLAMA: Final = "meta-llama/Meta-Llama-3.1-8B"
SHIPPED: Final = {
    "h100-sxm/llama-3.1-8b": ("h100_sxm", LLAMA, 1, "h100", "a100"),
    "h100-sxm/qwen3-8b": ("h100_sxm", "Qwen/Qwen3-8B", 1, "h100", "a100"),
    "h100-sxm/qwen3-32b": ("h100_sxm", "Qwen/Qwen3-32B", 1, "h100", "a100"),
    "h100-sxm/qwen3-32b-tp2": ("h100_sxm", "Qwen/Qwen3-32B", 2, "h100", "a100"),
    "h100-sxm/qwen3-30b-a3b": ("h100_sxm", "Qwen/Qwen3-30B-A3B", 1, "h100", "a100"),
    "h200-sxm/llama-3.1-8b": ("h200_sxm", LLAMA, 1, "h100", "a100"),
    "b200-sxm/llama-3.1-8b": ("b200_sxm", LLAMA, 1, "b200", "a100"),
    "b200-sxm/qwen3-32b": ("b200_sxm", "Qwen/Qwen3-32B", 1, "b200", "a100"),
    "rtx-pro-6000/llama-3.1-8b": (
        "rtx_pro_6000_server", LLAMA, 1, "rtx-pro-6000", "rtx-pro-6000",
    ),
}  # fmt: skip
"""Name -> system, model, GPUs, power model, clock shape."""


def ship(name: str, out: Path) -> None:
    """Build one of `SHIPPED` below `out`."""
    system, model, tensor_parallel, power, clocks = SHIPPED[name]
    source = Source(
        tables=open_tables(load_system(system), *ENGINE, None),
        decoder=load_decoder(model, tensor_parallel),
        power=load_power(power),
        clocks=load_clock_shape(clocks),
    )
    build_profile(source, out / name)


def command(name: str) -> str:
    """The command line that makes the same."""
    system, model, tensor_parallel, power, clocks = SHIPPED[name]
    return (
        f"voltana profile import --system {system} --engine {ENGINE[0]} --version {ENGINE[1]} "
        f"--model {model} --tp {tensor_parallel} --power-from {power} --clock-shape {clocks} "
        f"--out {name}"
    )


def main(arguments: Sequence[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Command line: all of them, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *SHIPPED])
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args(arguments)
    for name in options.names or SHIPPED:
        say(command(name))
        ship(name, options.out)


if __name__ == "__main__":
    main()
