"""GPUs: the driver, each card, and who may lock its clock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from voltana.experiments.doctor.finding import ABSENT, BROKEN, OK, Finding
from voltana.profiles.device.cards import list_uuids, open_gpu
from voltana.profiles.device.gpu import DeviceError, DriverMissingError
from voltana.profiles.device.nvml import NvmlGpu

AREA: Final = "cards"
DRIVER: Final = Path("/proc/driver/nvidia/version")
DEVICES: Final = Path("/dev/nvidiactl")
STATUS: Final = Path("/proc/self/status")
CAP_SYS_ADMIN: Final = 21


def find_cards() -> list[Finding]:
    """The driver, then a line a card; without a card the driver alone."""
    try:
        number = len(list_uuids())
    except DriverMissingError as error:
        return [_no_driver(error)]
    except DeviceError as error:
        return [Finding(area=AREA, name="NVML", state=BROKEN, found=str(error), remedy="see dmesg")]
    return [_rights(), *(_card(index) for index in range(number))]


def _no_driver(error: DeviceError) -> Finding:
    """A machine without a card is whole; one with a driver and without NVML is broken."""
    if DRIVER.exists():
        found = f"the kernel driver is loaded ({DRIVER})"
        remedy = (
            "install libnvidia-ml of the driver's version; in a container let it see the cards "
            "(NVIDIA_VISIBLE_DEVICES=all, NVIDIA_DRIVER_CAPABILITIES=utility)"
        )
    elif DEVICES.exists():
        found, remedy = f"{DEVICES} is there", "load the NVIDIA kernel driver"
    else:
        return Finding(
            area=AREA,
            name="GPU",
            state=ABSENT,
            found="no NVIDIA driver and no card",
            remedy="not needed to simulate, to replay on the CPU, or to serve with a stated "
            "power_w",
        )
    return Finding(
        area=AREA, name="NVML", state=BROKEN, found=f"{found}, and {error}", remedy=remedy
    )


def may_lock() -> bool:
    """Whether this process may lock a clock: NVML asks for root, in a container CAP_SYS_ADMIN."""
    words = dict(line.split(":\t", 1) for line in STATUS.read_text().splitlines() if ":\t" in line)
    return bool(int(words.get("CapEff", "0"), 16) >> CAP_SYS_ADMIN & 1)


def _rights() -> Finding:
    """Told and not tried: a lock that is tried is a lock."""
    who = f"user {os.geteuid()}"
    if may_lock():
        return Finding(
            area=AREA,
            name="clock locks",
            state=OK,
            found=f"this process may lock clocks ({who}, CAP_SYS_ADMIN); not tried",
        )
    return Finding(
        area=AREA,
        name="clock locks",
        state=ABSENT,
        found=f"this process may not lock clocks ({who}, without CAP_SYS_ADMIN)",
        remedy="run voltana actuator as root, or let it use zeusd (--zeusd): docs/deploy.md",
    )


def _card(index: int) -> Finding:
    try:
        with open_gpu(index, may_be_partitioned=True) as gpu:
            return _open_card(gpu)
    except DeviceError as error:
        return Finding(area=AREA, name=f"GPU {index}", state=BROKEN, found=str(error), remedy="")


def _open_card(gpu: NvmlGpu) -> Finding:
    identity = gpu.identity
    clocks = gpu.supported_clocks_mhz()
    said = [
        f"{identity.name}, {identity.uuid}, driver {identity.driver_version}",
        f"{identity.memory_bytes / 2**30:.0f} GiB, limit {identity.power_limit_w:.0f} W",
        f"clocks {clocks[0]} to {clocks[-1]} MHz" if clocks else "no clock can be locked",
        _energy(gpu),
    ]
    is_partitioned = gpu.is_partitioned()
    remedy = ""
    if is_partitioned:
        said.append("in MIG mode")
        remedy = "power and clocks are of the whole card: nvidia-smi -mig 0, or take another"
    elif not clocks:
        remedy = "limit power instead: voltana actuator --power-cap"
    return Finding(
        area=AREA,
        name=f"GPU {identity.index}",
        state=OK if clocks and not is_partitioned else ABSENT,
        found="; ".join(said),
        remedy=remedy,
    )


def _energy(gpu: NvmlGpu) -> str:
    try:
        gpu.energy_j()
    except DeviceError:
        return "no energy counter: power is integrated"
    return "energy counter"
