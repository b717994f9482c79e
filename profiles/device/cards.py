"""The cards that a command names: opened by NVML, and made the only ones that CUDA sees.

NVML numbers cards by PCI bus, CUDA by speed unless told otherwise, and it obeys
CUDA_VISIBLE_DEVICES, which NVML does not. A UUID would mean the same card to both, but SGLang reads
that variable as numbers when it runs on several cards: so CUDA is told to number them as NVML does.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

from voltana.profiles.common.errors import VoltanaError
from voltana.profiles.device.constant import ConstantPowerGpu
from voltana.profiles.device.gpu import DeviceError, DriverMissingError, Gpu
from voltana.profiles.device.nvml import NvmlGpu
from voltana.profiles.device.zeusd import Zeusd, ZeusdGpu

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
ORDER: Final = "CUDA_DEVICE_ORDER"
ALL: Final = "all"


def parse_indices(text: str) -> tuple[int, ...]:
    """NVML indices out of "0" or "0,1".

    Raises:
        VoltanaError: Not distinct numbers separated by commas.

    Example:
        >>> parse_indices("0,1")
        (0, 1)
    """
    parts = text.split(",")
    indices = tuple(int(part) for part in parts if part.strip().isdecimal())
    if not len(set(indices)) == len(indices) == len(parts):
        raise VoltanaError(
            f"--gpu must be distinct NVML indices separated by commas, got {text!r}: e.g. 0,1; "
            "nvidia-smi lists them"
        )
    return indices


def open_gpu(
    card: int | str, *, may_be_partitioned: bool = False, zeusd: str | None = None
) -> NvmlGpu:
    """One card. The one place where cards are opened.

    Args:
        card: NVML's index, as `nvidia-smi` counts, or the card's UUID.
        may_be_partitioned: Take a card in MIG mode too: its power and clocks are of the whole card,
            not of a part's work.
        zeusd: Address of the daemon that sets its clock in this process's place; None sets it here.

    Raises:
        DeviceError: No such card, no driver, or it is in MIG mode.
    """
    index = card if isinstance(card, int) else find_cards([card])[0]
    gpu = NvmlGpu(index) if zeusd is None else ZeusdGpu(index, Zeusd(zeusd))
    if not may_be_partitioned and gpu.is_partitioned():
        gpu.close()
        raise DeviceError(
            f"GPU {index} must not be partitioned, it is in MIG mode: power and clocks are of the "
            "whole card; end it (nvidia-smi -mig 0) or take another --gpu"
        )
    return gpu


def find_cards(names: Sequence[str]) -> list[int]:
    """NVML's indices of cards by index ("0"), UUID ("GPU-…") or "all", ascending, each once.

    Raises:
        DeviceError: No such card, or no driver.
    """
    if all(name.isdecimal() for name in names):
        return sorted({int(name) for name in names})
    uuids = list_uuids()
    found: set[int] = set()
    for name in names:
        if name == ALL:
            found |= set(range(len(uuids)))
        elif name.isdecimal():
            found.add(int(name))
        elif name in uuids:
            found.add(uuids.index(name))
        else:
            raise DriverMissingError(
                f"a GPU must be one that NVML has here, got {name!r}: it has {', '.join(uuids)}"
            )
    return sorted(found)


def list_uuids() -> list[str]:
    """The UUIDs of all cards that NVML has here, by index.

    Raises:
        DeviceError: No driver, or no card.
    """
    with NvmlGpu(0) as first:
        number = first.num_cards()
    found = []
    for index in range(number):
        with NvmlGpu(index) as gpu:
            found.append(gpu.identity.uuid)
    return found


def open_gpus(indices: Sequence[int | str], power_w: float | None) -> list[Gpu]:
    """The cards of an instance, or one of a stated power that stands for them.

    Raises:
        DeviceError: As `open_gpu`.
    """
    if power_w is not None:
        return [ConstantPowerGpu(power_w)]
    return [open_gpu(index) for index in indices]


@contextmanager
def open_cards(text: str, power_w: float | None) -> Iterator[list[Gpu]]:
    """The named cards, alone visible to CUDA in this process and those it starts.

    Args:
        text: NVML indices separated by commas.
        power_w: No card: the constant power of a stand-in.

    Raises:
        VoltanaError: No such cards, cards of different kinds, or one in MIG mode.
    """
    if power_w is not None:
        yield open_gpus((), power_w)
        return
    with ExitStack() as stack:
        cards = [stack.enter_context(open_gpu(index)) for index in parse_indices(text)]
        names = sorted({card.identity.name for card in cards})
        if len(names) > 1:
            raise DeviceError(
                f"the cards of an instance must be of one kind, got {' and '.join(names)} (--gpu)"
            )
        stack.enter_context(visible_alone([card.identity.index for card in cards]))
        yield list(cards)


def cuda_environment(indices: Sequence[int]) -> dict[str, str]:
    """What shows CUDA these cards alone, numbered by bus as NVML does and not by speed."""
    return {ORDER: "PCI_BUS_ID", VISIBLE: ",".join(map(str, indices))}


@contextmanager
def visible_alone(indices: Sequence[int]) -> Iterator[None]:
    """Show CUDA these cards alone, in this order; enter it before CUDA is first used."""
    wanted = cuda_environment(indices)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def slug(name: str) -> str:
    """A folder's name for a card.

    Example:
        >>> slug("NVIDIA H200"), slug("NVIDIA A100-SXM4-80GB")
        ('h200', 'a100-sxm4-80gb')
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain.removeprefix("nvidia-")


if __name__ == "__main__":  # for the Makefile
    try:
        with open_gpu(0, may_be_partitioned=True) as first:
            sys.stdout.write(slug(first.identity.name) + "\n")
    except DeviceError as error:
        raise SystemExit(f"voltana: {error}") from None
