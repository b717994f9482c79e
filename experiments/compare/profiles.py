"""Does one profile have the shape of another? A measured one beside the calibrated model of it.

Two cards, or a model and a card, differ by a factor that says little; what a policy lives on is the
shape: how time grows with batch and tokens, where it steps, how power rises. So each quantity is
compared point by point after one factor for the whole phase (the median ratio) is taken out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.common.markdown import markdown_table

PHASES: Final = ("prefill", "decode")
UNITS: Final = {"time_s": "iteration time", "power_w": "power"}
CONTEXT_TOKENS: Final = 512
MIN_STEP: Final = 0.03
"""Rise from a batch size to the next one, as a fraction, that counts as a step."""
MIN_POINTS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One quantity of one phase, ours over theirs."""

    phase: str
    quantity: str
    num_points: int
    num_outside: int
    """Our points outside their grid; not compared."""
    scale: float
    """Median of ours / theirs."""
    median_off: float
    """Median over the points of |ours / theirs / scale - 1|: the difference in shape."""
    p90_off: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Decode time_s = constant_s + per_request_s·batch + per_token_s·tokens, least squares."""

    profile: str
    constant_s: float
    per_request_s: float
    per_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A rise of decode time from one batch size to the next."""

    batch_size: int
    ours: float
    """time(batch + 1) / time(batch) - 1."""
    theirs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileComparison:
    """All of it."""

    ours: Profile
    theirs: Profile
    clocks_mhz: tuple[int, int]
    points: pd.DataFrame
    """phase, batch_size, tokens, time_s, power_w of ours, and time_s_theirs, power_w_theirs."""
    shapes: tuple[Shape, ...]
    costs: tuple[Costs, Costs]
    steps: tuple[Step, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the points, which `shape.csv` has."""
        return {
            "profile": self.ours.name,
            "beside": self.theirs.name,
            "clocks_mhz": list(self.clocks_mhz),
            "shapes": [asdict(shape) for shape in self.shapes],
            "costs": [asdict(costs) for costs in self.costs],
            "steps": [asdict(step) for step in self.steps],
        }


def compare_profiles(ours: Profile, theirs: Profile) -> ProfileComparison:
    """Compare at the top clock of each, at our points as far as their grid holds them.

    Raises:
        VoltanaError: Fewer than `MIN_POINTS` points of a phase lie in both.
    """
    clocks_mhz = ours.clocks_mhz[-1], theirs.clocks_mhz[-1]
    points = pd.concat([_points(ours, theirs, phase, clocks_mhz) for phase in PHASES])
    shapes = [_shape(points, phase, quantity) for quantity in UNITS for phase in PHASES]
    decode = points[(points["phase"] == "decode") & points["time_s_theirs"].notna()]
    return ProfileComparison(
        ours=ours,
        theirs=theirs,
        clocks_mhz=clocks_mhz,
        points=points.reset_index(drop=True),
        shapes=tuple(shapes),
        costs=(_costs(ours, decode, "time_s"), _costs(theirs, decode, "time_s_theirs")),
        steps=tuple(_steps(decode)),
    )


def note_text(found: ProfileComparison) -> str:
    """The comparison in words and tables."""
    ours, theirs = found.ours, found.theirs
    intro = (
        f"{_origin(ours)} at {found.clocks_mhz[0]} MHz; {_origin(theirs)} at "
        f"{found.clocks_mhz[1]} MHz. Scale: median of the first over the second. Shape: how far "
        "the points lie from that one factor."
    )
    lines = [
        f"# {ours.name} beside {theirs.name}",
        "",
        intro,
        "",
        markdown_table(
            ("phase", "quantity", "points", "outside", "scale", "shape, median", "shape, p90"),
            [
                (
                    s.phase,
                    UNITS[s.quantity],
                    str(s.num_points),
                    str(s.num_outside),
                    f"{s.scale:.3f}",
                    f"{s.median_off:.1%}",
                    f"{s.p90_off:.1%}",
                )
                for s in found.shapes
            ],
        ),
        "",
        "Decode as a constant, a cost per request and a cost per token of context:",
        "",
        markdown_table(
            ("profile", "constant, ms", "per request, µs", "per 1,000 tokens, µs"),
            [
                (
                    c.profile,
                    f"{1e3 * c.constant_s:.3f}",
                    f"{1e6 * c.per_request_s:.2f}",
                    f"{1e9 * c.per_token_s:.3f}",
                )
                for c in found.costs
            ],
        ),
        "",
        *_step_lines(found.steps),
        "",
        "![iteration time and power of both](comparison.png)",
        "",
    ]
    return "\n".join(lines)


def _step_lines(steps: tuple[Step, ...]) -> list[str]:
    if not steps:
        return [f"No step of decode time above {MIN_STEP:.0%} from a batch size to the next."]
    rows = [
        (f"{s.batch_size} to {s.batch_size + 1}", f"{s.ours:+.1%}", f"{s.theirs:+.1%}")
        for s in steps
    ]
    return [
        f"Steps of decode time above {MIN_STEP:.0%} in either, from a batch size to the next:",
        "",
        markdown_table(("batch", "first", "second"), rows),
    ]


def _origin(profile: Profile) -> str:
    status = {profile.meta.provenance[f"decode_{what}"].status for what in ("time", "power")}
    told = (
        profile.meta.provenance["decode_time"].status,
        profile.meta.provenance["decode_power"].status,
    )
    words = told[0] if len(status) == 1 else f"time {told[0]}, power {told[1]}"
    return f"{profile.name} ({words}, {profile.meta.gpu.name}, {profile.meta.engine.name})"


def _points(
    ours: Profile, theirs: Profile, phase: str, clocks_mhz: tuple[int, int]
) -> pd.DataFrame:
    table = ours.prefill if phase == "prefill" else ours.decode
    table = table[table["frequency_mhz"] == clocks_mhz[0]]
    medians = table.groupby(["batch_size", "tokens"])[["time_s", "power_w"]].median().reset_index()
    model = theirs.truth()
    answers = []
    for batch_size, tokens in zip(medians["batch_size"], medians["tokens"], strict=True):
        try:
            answers.append(model.time_and_power(phase, clocks_mhz[1], int(batch_size), int(tokens)))
        except VoltanaError:
            answers.append((float("nan"), float("nan")))
    columns = ["time_s_theirs", "power_w_theirs"]
    both = medians.join(pd.DataFrame(answers, columns=columns, index=medians.index))
    both.insert(0, "phase", phase)
    return both


def _shape(points: pd.DataFrame, phase: str, quantity: str) -> Shape:
    rows = points[points["phase"] == phase]
    inside = rows.dropna()
    if len(inside) < MIN_POINTS:
        raise VoltanaError(
            f"a comparison needs >= {MIN_POINTS} {phase} points within both profiles, got "
            f"{len(inside)} of {len(rows)}: measure more points, or compare with another profile"
        )
    ratio = (inside[quantity] / inside[f"{quantity}_theirs"]).to_numpy(dtype=float)
    scale = float(np.median(ratio))
    off = np.abs(ratio / scale - 1.0)
    return Shape(
        phase=phase,
        quantity=quantity,
        num_points=len(inside),
        num_outside=len(rows) - len(inside),
        scale=scale,
        median_off=float(np.median(off)),
        p90_off=float(np.quantile(off, 0.9)),
    )


def _costs(profile: Profile, rows: pd.DataFrame, column: str) -> Costs:
    """Relative least squares: every point counts the same, short iterations too."""
    time_s = rows[column].to_numpy(dtype=float)
    terms = np.column_stack([np.ones(len(rows)), rows["batch_size"], rows["tokens"]]).astype(float)
    scale = terms.max(axis=0)
    found = nnls(terms / scale / time_s[:, None], np.ones(len(rows)))[0] / scale
    return Costs(
        profile=profile.name,
        constant_s=float(found[0]),
        per_request_s=float(found[1]),
        per_token_s=float(found[2]),
    )


def _steps(decode: pd.DataFrame) -> list[Step]:
    rows = at_context(decode).sort_values("batch_size")
    found = []
    for low, high in pairwise(rows.itertuples(index=False)):
        if int(str(high.batch_size)) != int(str(low.batch_size)) + 1:
            continue
        ours = float(str(high.time_s)) / float(str(low.time_s)) - 1.0
        theirs = float(str(high.time_s_theirs)) / float(str(low.time_s_theirs)) - 1.0
        if max(abs(ours), abs(theirs)) > MIN_STEP and int(str(low.batch_size)) >= 8:
            found.append(Step(batch_size=int(str(low.batch_size)), ours=ours, theirs=theirs))
    return found


def at_context(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each batch size the point nearest to the context, none beyond a factor of 2."""
    context = rows["tokens"] / rows["batch_size"]
    target = context.iloc[int((context - CONTEXT_TOKENS).abs().argmin())]
    off = (np.log(context) - np.log(target)).abs()
    nearest = off.groupby(rows["batch_size"]).idxmin()
    found: pd.DataFrame = rows.loc[nearest[(off.loc[nearest] <= np.log(2.0)).to_numpy()]]
    return found
