"""Where every number of an imported profile comes from, and how sure it is."""

from __future__ import annotations

from typing import Final

from voltana.profiles.importing.decoder import Decoder
from voltana.profiles.importing.power import CLOCK_ERRORS, POWER_ERROR, ClockShape, PowerModel
from voltana.profiles.importing.systems import TAKEN_OVER, TAKEN_OVER_ERROR, load_host
from voltana.profiles.importing.tables import KernelTables
from voltana.profiles.schema import ErrorsMeta, Provenance

PREFILL_TIME_ERROR: Final = 0.2
PREFILL_POWER_ERROR: Final = 0.2
NO_CLOCKS: Final = "one clock only: no clock shape was given (--clock-shape)"
NO_POWER: Final = "the board's power limit throughout: no power model was given (--power-from)"


def provenance(
    tables: KernelTables, decoder: Decoder, power: PowerModel | None, clocks: ClockShape | None
) -> dict[str, Provenance]:
    """What `profile.toml` says of an imported profile.

    Args:
        tables: What kernel times come from.
        decoder: The model on its cards.
        power: Model of its power; None where nothing tells energy.
        clocks: How time and power move with the clock; None if no card tells.
    """
    host = load_host(tables.system)
    is_alike = not decoder.experts and decoder.tensor_parallel == 1
    kernels = (
        f"kernel times of {tables.system.key}, {tables.engine} {tables.version}, at its default "
        f"clock, from {tables.origin} (Apache-2.0)"
    )
    return {
        "clocks": _clocks(tables, clocks),
        "prefill_time": Provenance(
            status="modelled",
            source=f"{kernels}; host time of 5 ms a batch as of the A100 profiles",
            uncertainty="about 20 % at the default clock: no measured prefill to hold it against",
        ),
        "decode_time": Provenance(
            status=host.status if is_alike else "modelled",
            source=f"{kernels}; beside them {1e6 * host.per_layer_s:.1f} us a layer and "
            f"{1e6 * host.per_request_s:.1f} us a request, {host.source}",
            uncertainty=host.uncertainty if is_alike else TAKEN_OVER,
        ),
        "prefill_power": _prefill_power(tables, power),
        "decode_power": power.stated(tables.system) if power else _modelled(NO_POWER, "no energy"),
        "idle_power": power.idle_provenance if power else _modelled(NO_POWER, "no energy"),
        "clock_dependence": clocks.provenance if clocks else _modelled(NO_CLOCKS, ""),
        "kv_capacity": _modelled(
            "0.9 of the memory less weights and 3.5 GiB (the data base's own figure for the rest)",
            "about 10 %",
        ),
        "iteration_spread": _modelled(
            "2 % in both phases, as of the A100 profiles", "0.5 to 5 %; the host's share is unknown"
        ),
        "tables_read": Provenance(
            status="calibrated",
            source="; ".join(f"{name} sha256 {d}" for name, d in sorted(tables.digests.items())),
        ),
    }


def stated_errors(
    tables: KernelTables, decoder: Decoder, power: PowerModel | None, clocks: ClockShape | None
) -> ErrorsMeta:
    """`[errors]` of an imported profile: the uncertainties of its provenance as numbers.

    Args:
        tables: Where its kernel times are from.
        decoder: The model's shape.
        power: Power at the top clock; None: it has none.
        clocks: How time and power move with the clock; None: it has one clock.
    """
    is_alike = not decoder.experts and decoder.tensor_parallel == 1
    host = load_host(tables.system)
    time_error, exponent = (clocks.time_error, clocks.power_error) if clocks else CLOCK_ERRORS
    decode_power = power.error(tables.system) if power else POWER_ERROR
    return ErrorsMeta(
        prefill_time=PREFILL_TIME_ERROR,
        decode_time=host.time_error if is_alike else TAKEN_OVER_ERROR,
        prefill_clock_time=time_error,
        decode_clock_time=time_error,
        prefill_power=max(PREFILL_POWER_ERROR, decode_power),
        decode_power=decode_power,
        prefill_clock_power=exponent,
        decode_clock_power=exponent,
        idle_power=power.idle_error if power else POWER_ERROR,
    )


def _clocks(tables: KernelTables, clocks: ClockShape | None) -> Provenance:
    system = tables.system
    what = f"locks of {system.name} in steps of {system.step_mhz} MHz up to {system.top_mhz} MHz"
    if clocks is None:
        return _modelled(f"{what}; {NO_CLOCKS}", "")
    return _modelled(
        f"{what}, from {clocks.lowest:.2f} of it, where the clock shape {clocks.name!r} begins",
        "the default clock of an unlocked card is taken for its top one",
    )


def _prefill_power(tables: KernelTables, power: PowerModel | None) -> Provenance:
    if power is None:
        return _modelled(NO_POWER, "no energy")
    stated = power.stated(tables.system).source
    return _modelled(
        f"{stated}; extended to prefill's arithmetic, held at the power limit",
        "20 %: what prefill draws below the power limit has no measurement",
    )


def _modelled(source: str, uncertainty: str) -> Provenance:
    return Provenance(status="modelled", source=source, uncertainty=uncertainty)
