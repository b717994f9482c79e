"""A profile beside measured rows of serving: gaps between tokens and power."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from voltana.profiles.catalog import Profile
from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.evidence import PROMPT_TOKENS, Row

HOST_BOUND: Final = 0.25
"""A row whose gap is longer and whose power is lower than predicted by more than this share: the
GPU waits for its host there, which no kernel table knows."""
PROMPTS_TOGETHER: Final = 16
"""Of a prefill: the rows' engine runs prompts beside its decode, so that the host's time of a
prefill batch is not paid by each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A row and what the profile says of it."""

    row: Row
    itl_s: float
    power_w: float

    @property
    def itl_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.itl_s / self.row.itl_s - 1.0

    @property
    def power_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.power_w / self.row.power_w - 1.0

    @property
    def is_host_bound(self) -> bool:
        """Whether time and power both say that the GPU waited."""
        return self.itl_s < self.row.itl_s * (1 - HOST_BOUND) and self.power_error > HOST_BOUND

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the measured row, what the profile says, and both errors."""
        return {
            **asdict(self.row),
            "profile_itl_s": self.itl_s,
            "profile_power_w": self.power_w,
            "itl_error_frac": self.itl_error,
            "power_error_frac": self.power_error,
            "is_host_bound": self.is_host_bound,
        }


def compare_rows(
    profile: Profile, rows: Sequence[Row], prompts: Mapping[str, float]
) -> list[Compared]:
    """Predict every row of the profile's model, card and number of GPUs.

    Args:
        profile: With a decode and a prefill table at its top clock.
        rows: Measured ones.
        prompts: Task -> mean prompt tokens; besides the tasks that are known.

    Raises:
        VoltanaError: No row is of this profile, or a task's prompt is not known.
    """
    meta = profile.meta
    own = [r for r in rows if _model(r.model) == _model(meta.model.name)
           and r.gpu.lower() in meta.gpu.name.lower()
           and r.num_gpus == r.tensor_parallel == meta.model.tensor_parallel
           and r.precision in ("", "bfloat16")]  # fmt: skip
    if not own:
        raise VoltanaError(
            f"no row is of {meta.model.name} in bf16 on {meta.model.tensor_parallel} "
            f"{meta.gpu.name}: the files have {_known(rows)}"
        )
    known = {**PROMPT_TOKENS, **prompts}
    missing = sorted({r.task for r in own} - set(known))
    if missing:
        raise VoltanaError(
            f"the mean prompt of task {missing[0]!r} is not known: "
            f"state it with --prompt-tokens {missing[0]}=TOKENS"
        )
    return [_compare(profile, row, known[row.task]) for row in own]


def parse_prompts(texts: Iterable[str]) -> dict[str, float]:
    """TASK=TOKENS, each."""
    found = {}
    for text in texts:
        task, _, tokens = text.partition("=")
        try:
            found[task] = float(tokens)
        except ValueError:
            found[task] = 0.0
        if found[task] <= 0:
            raise VoltanaError(f"--prompt-tokens must be TASK=TOKENS with tokens > 0, got {text!r}")
    return found


def parse_range(text: str) -> tuple[float, float]:
    """LOW-HIGH."""
    low, dash, high = text.partition("-")
    if not (dash and low.isdigit() and high.isdigit() and int(low) <= int(high)):
        raise VoltanaError(f"--batches must be LOW-HIGH, got {text!r}: e.g. 8-256")
    return float(low), float(high)


def report_lines(found: Sequence[Compared], batches: tuple[float, float]) -> list[str]:
    """A line a row, and the mean errors by task and over all."""
    head = f"{'task':16} {'batch':>6} {'tokens':>6}  {'ITL ms':>7} {'profile':>7} {'error':>6}  "
    lines = [head + f"{'power W':>7} {'profile':>7} {'error':>6}"]
    for c in found:
        row, mark = c.row, "  waits for its host" if c.is_host_bound else ""
        lines.append(
            f"{row.task:16} {row.batch:6.0f} {row.held_output_tokens:6.0f}  "
            f"{1e3 * row.itl_s:7.2f} {1e3 * c.itl_s:7.2f} {c.itl_error:+6.0%}  "
            f"{row.power_w:7.0f} {c.power_w:7.0f} {c.power_error:+6.0%}{mark}"
        )
    low, high = batches
    # a mean batch lies a little below the limit of running requests that the row is named after
    within = [c for c in found if 0.97 * low <= c.row.batch <= high]
    whole = f"batches {low:.0f} to {high:.0f}"
    lines += [
        _mean(f"{task}, {whole}", [c for c in within if c.row.task == task])
        for task in sorted({c.row.task for c in within})
    ]
    lines.append(_mean(f"all, {whole}", within))
    if any(c.is_host_bound for c in within):
        lines.append(
            _mean(f"all but those that wait, {whole}", [c for c in within if not c.is_host_bound])
        )
    return lines


def _mean(what: str, found: Sequence[Compared]) -> str:
    if not found:
        return f"{what}: no rows"
    itl = sum(abs(c.itl_error) for c in found) / len(found)
    power = sum(abs(c.power_error) for c in found) / len(found)
    return f"{what}: mean error ITL {itl:.1%}, power {power:.1%} ({len(found)} rows)"


def _compare(profile: Profile, row: Row, prompt_tokens: float) -> Compared:
    """Decode at the row's mean batch, and the prefills that its finished requests call for."""
    truth, top = profile.truth(extrapolate=True), profile.clocks_mhz[-1]
    batch, tokens = max(round(row.batch), 1), row.batch * row.context_tokens(prompt_tokens)
    decode_s = truth.predict_s("decode", top, batch, int(tokens))
    new = (PROMPTS_TOGETHER, int(PROMPTS_TOGETHER * prompt_tokens))
    prefill_s = row.batch / row.output_tokens * truth.predict_s("prefill", top, *new) / new[0]
    joules = decode_s * truth.power_w("decode", top, batch, int(tokens))
    joules += prefill_s * truth.power_w("prefill", top, *new)
    return Compared(row=row, itl_s=decode_s, power_w=joules / (decode_s + prefill_s))


def _model(name: str) -> str:
    """The last part of a name, without what only says that it was tuned to chat."""
    last = name.rsplit("/", maxsplit=1)[-1].lower()
    return last.removeprefix("meta-").removesuffix("-instruct")


def _known(rows: Sequence[Row]) -> str:
    seen = sorted({f"{r.model} on {r.num_gpus} {r.gpu}" for r in rows})
    return ", ".join(seen[:4]) + (f" and {len(seen) - 4} more" if len(seen) > 4 else "")
