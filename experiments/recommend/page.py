"""One HTML page of the advice that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from voltana.experiments.compare.intervals import Interval
from voltana.experiments.recommend.show import RANGES, half_text, range_text
from voltana.profiles.common.files import write_text
from voltana.sim.config import make_config


def write_page(
    advices: Sequence[Mapping[str, Any]], figures: Sequence[Path], path: Path, currency: str
) -> None:
    """Write the page.

    Args:
        advices: As `voltana.experiments.recommend.show.as_dict` makes them.
        figures: PNG of the knee of each.
        path: Of the page.
        currency: Of the money, for the reader.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    template = environment.get_template("page.html.j2")
    rows = [
        {**advice, **_promises(advice["question"]), "figure": _embedded(figure)}
        for advice, figure in zip(advices, figures, strict=True)
    ]
    write_text(
        template.render(
            advices=rows, currency=currency, half=_half, RANGES=RANGES, range_text=range_text
        ),
        path,
    )


def _promises(question: Mapping[str, Any]) -> dict[str, str]:
    own = ("gpus", "watts", "target", "draws")
    config = make_config({k: v for k, v in question.items() if k not in own})
    load = config.trace or f"{config.workload} at {config.rate_rps:g} requests/s"
    return {
        "load": load,
        "ttft_ms": f"{1e3 * config.slo_ttft_s:g}",
        "itl_ms": f"{1e3 * config.slo_itl_s:g}",
        "target_pct": f"{100 * question['target']:g}",
    }


def _embedded(figure: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode()


def _half(found: Mapping[str, float]) -> str:
    return half_text(Interval(**found))
