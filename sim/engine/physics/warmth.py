"""A card whose power depends on its temperature: leakage, and one thermal resistance and capacity.

The table's power P0 is that of a card at `table_c`; at T it draws P0·(1 + leakage·(T - table_c)).
T goes towards ambient + resistance · what it draws, with a time constant. While P0 is constant
that is one linear equation with one closed form, time and energy of a stretch being exact however
it is cut:

    T(t) = end + (T(0) - end)·exp(-b·t/time),    b = 1 - resistance·leakage·P0

The powers of a table were measured on a card that was as warm as its work made it. What is added
here is therefore only right in the difference between two runs.
"""

from __future__ import annotations

import math

from voltana.profiles.common.errors import VoltanaError
from voltana.sim.engine.physics.air import AirParameters
from voltana.sim.engine.physics.run import Run


class Warmth:
    """Temperature of one instance's cards, all alike, and what it does to their power."""

    __slots__ = ("_ambient_c", "_leakage", "_resistance_c_per_w", "_table_c", "_time_s",
                 "temperature_c")  # fmt: skip

    def __init__(self, air: AirParameters, num_cards: int) -> None:
        """See the class.

        Args:
            air: The parameters.
            num_cards: Cards of the instance, which share its power evenly.
        """
        self._ambient_c, self._table_c = air.ambient_c, air.table_c
        self._leakage, self._time_s = air.leakage_frac, air.time_s
        self._resistance_c_per_w = air.resistance_c_per_w / num_cards
        self.temperature_c = air.ambient_c

    def power_w(self, table_w: float) -> float:
        """What is drawn now where the table says `table_w`."""
        return table_w * (1.0 + self._leakage * (self.temperature_c - self._table_c))

    def settled_c(self, table_w: float) -> float:
        """Where the temperature goes at that power.

        Raises:
            VoltanaError: It goes to no end, as each degree makes more than a degree.
        """
        heat_c = self._resistance_c_per_w * table_w
        pull = 1.0 - heat_c * self._leakage
        if pull <= 0.0:
            raise VoltanaError(
                f"temperature must settle: resistance * leakage * power must be < 1, got "
                f"{heat_c * self._leakage:.3g} at {table_w:.0f} W: lower resistance or leakage"
            )
        return (self._ambient_c + heat_c * (1.0 - self._leakage * self._table_c)) / pull

    def spend(self, table_w: float, elapsed_s: float) -> float:
        """Let that time pass at that power of the table; returns the energy drawn, in J."""
        end_c = self.settled_c(table_w)
        pull = 1.0 - self._resistance_c_per_w * table_w * self._leakage
        gone = -math.expm1(-pull * elapsed_s / self._time_s)
        above_c = self.temperature_c - end_c
        self.temperature_c = end_c + above_c * (1.0 - gone)
        degree_s = (end_c - self._table_c) * elapsed_s + above_c * gone * self._time_s / pull
        return table_w * (elapsed_s + self._leakage * degree_s)


class WarmRun(Run):
    """A `Run` whose power follows the temperature, worked out iteration by iteration.

    What it has worked out is kept until the next run begins, which another start shows.
    """

    __slots__ = ("_energies_j", "_of_start_s", "_temperatures_c", "_warmth", "pieces")

    def __init__(self, warmth: Warmth, pieces: list[tuple[float, float, float, int]]) -> None:
        """See the class.

        Args:
            warmth: As of the run's start; `settle` brings it to the end.
            pieces: The track's parts of a split iteration.
        """
        super().__init__()
        self._warmth = warmth
        self.pieces = pieces
        self._of_start_s = -1.0
        self._energies_j = [0.0]
        self._temperatures_c = [0.0]

    def energy_j(self, count: int) -> float:
        self._work_out(count)
        return self._energies_j[count]

    def power_w(self, k: int) -> float:
        """Mean power during iteration k."""
        self._work_out(k + 1)
        return (self._energies_j[k + 1] - self._energies_j[k]) / self.iteration_s(k)

    def part_j(self, ended: int, elapsed_s: float) -> float:
        self._work_out(ended)
        now_c, self._warmth.temperature_c = (
            self._warmth.temperature_c, self._temperatures_c[ended]
        )  # fmt: skip
        energy_j = self._warmth.spend(self.first_w + ended * self.step_w, elapsed_s)
        self._warmth.temperature_c = now_c
        return energy_j

    def settle(self) -> None:
        """The run is over: the temperature is that of its end."""
        self._work_out(self.count)
        self._warmth.temperature_c = self._temperatures_c[self.count]

    def _work_out(self, count: int) -> None:
        """Energies and temperatures of the first iterations."""
        warmth, start_c = self._warmth, self._warmth.temperature_c
        if self._of_start_s != self.start_s:
            self._of_start_s = self.start_s
            self._energies_j, self._temperatures_c = [0.0], [start_c]
        energies_j, temperatures_c = self._energies_j, self._temperatures_c
        while len(energies_j) <= count:
            k = len(energies_j) - 1
            warmth.temperature_c = temperatures_c[k]
            energy_j = 0.0
            if self.pieces:
                for start_s, end_s, power_w, _ in self.pieces:
                    energy_j += warmth.spend(power_w, end_s - start_s)
            else:
                energy_j = warmth.spend(self.first_w + k * self.step_w, self.iteration_s(k))
            energies_j.append(energies_j[k] + energy_j)
            temperatures_c.append(warmth.temperature_c)
        warmth.temperature_c = start_c
