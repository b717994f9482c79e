"""How well the fitted constants predict a model that took no part in the fit.

    python -m voltana.profiles.importing.held_out --data DIR

DIR as of `voltana.profiles.importing.fit`. Of each card every model is left out in turn: host times
and power coefficients are fitted to the others' rows, and held against its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voltana.profiles.common.markdown import markdown_table
from voltana.profiles.evidence import Row, read_rows
from voltana.profiles.importing.fit import (
    CARDS,
    IDLE,
    fit_power,
    host_design,
    power_design,
    relative_fit,
    usable,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Errors of one quantity of a model that was left out, in %."""

    gpu: str
    model: str
    quantity: str
    rows: int
    fitted_to: int
    """Rows of the other models."""
    mean_pct: float
    worst_pct: float


def held_out(rows: Sequence[Row], tables: Path | None, name: str) -> list[HeldOut]:
    """Of one card, for each model and quantity.

    Args:
        rows: Usable rows of the card.
        tables: Folder of kernel tables; None takes the installed wheel.
        name: The card, one of `voltana.profiles.importing.fit.CARDS`.
    """
    gpu, system = CARDS[name]
    idle_w = IDLE[name][0]
    found = []
    for model in sorted({r.model for r in rows}):
        mine = [r for r in rows if r.model == model]
        others = [r for r in rows if r.model != model]
        for quantity in ("gap between tokens", "power"):
            if quantity == "power":
                design, _ = power_design(others)
                own, watts = power_design(mine)
                errors = (idle_w + own @ fit_power(others, idle_w)[0] - watts) / watts
            else:
                design, rest, gaps = host_design(others, tables, system)
                own, own_rest, own_gaps = host_design(mine, tables, system)
                if not len(own) or not len(design):
                    continue  # its attention kernel is not in the tables
                fitted = relative_fit(design, rest, gaps)[0]
                errors = (own @ fitted - own_rest) / own_gaps
            off = 100.0 * np.abs(errors)
            found.append(
                HeldOut(gpu=gpu, model=model, quantity=quantity, rows=len(off),
                        fitted_to=len(design), mean_pct=float(off.mean()),
                        worst_pct=float(off.max()))
            )  # fmt: skip
    return found


def main(say: Callable[[str], object] = print) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", type=Path, default=None)
    options = parser.parse_args()
    tables = options.tables or options.data / "aiconfigurator_sglang0.5.14"
    rows = read_rows([options.data / "ml_energy_v3" / "qwen3_8b_gemma3_h100_b200.csv"])
    found = [
        each
        for name, (gpu, _) in CARDS.items()
        for each in held_out(usable(rows, gpu), tables, name)
    ]
    heads = ("card", "left out", "quantity", "its rows", "fitted to", "mean error %", "worst %")
    cells = [
        (h.gpu, h.model, h.quantity, str(h.rows), str(h.fitted_to), f"{h.mean_pct:.1f}",
         f"{h.worst_pct:.1f}")
        for h in found
    ]  # fmt: skip
    say(markdown_table(heads, cells, numbers=range(3, 7)))


if __name__ == "__main__":
    main()
