"""The kernel tables of one card, engine and version, read and checked.

Two layouts are known: the folder `systems/data` of the aiconfigurator-core wheel (parquet files,
`SYSTEM/gemm/ENGINE/VERSION/gemm_perf.parquet` and so on), and an extract of it
(`SYSTEM/gemm_bf16_ENGINEVERSION.csv.gz`). Only `latency` is taken: the wheel's `power` columns are
no steady power (a one-second mean sampled within a third of a second).

Source: ai-dynamo/aiconfigurator (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import pandas as pd

from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.importing.systems import System

PACKAGE: Final = "aiconfigurator_core"
_DATA: Final = "systems/data"
_WHEEL_FILES: Final = {
    "gemm": "gemm/{engine}/{version}/gemm_perf.parquet",
    "decode_attention": "attention/{engine}/{version}/generation_attention_perf.parquet",
    "prefill_attention": "attention/{engine}/{version}/context_attention_perf.parquet",
    "allreduce": "comm/{engine}/{version}/custom_allreduce_perf.parquet",
    "moe": "moe/{engine}/{version}/moe_perf.parquet",
}
_EXTRACT_FILES: Final = {
    "gemm": "gemm_bf16_{engine}{version}.csv.gz",
    "decode_attention": "decode_attention_{engine}{version}.csv.gz",
    "prefill_attention": "prefill_attention_{engine}{version}.csv.gz",
    "allreduce": "allreduce_{engine}{version}.csv.gz",
    "moe": "moe_{engine}{version}.csv.gz",
}
_ONLY: Final[Mapping[str, Mapping[str, object]]] = {
    "gemm": {"gemm_dtype": "bfloat16"},
    "decode_attention": {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": 0},
    "prefill_attention": {"attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16", "window_size": 0},
    "allreduce": {"allreduce_dtype": "bfloat16"},
    "moe": {"moe_dtype": "bfloat16", "moe_ep_size": 1},
}
"""Rows of bf16 models with full attention; a column that a table lacks is not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTables:
    """Tables of one card, engine and version, read when asked for."""

    folder: Path
    """Of the card."""
    files: Mapping[str, str]
    """Kind of kernel -> path below `folder`."""
    system: System
    engine: str
    version: str
    origin: str
    """Where they come from, for people."""
    digests: dict[str, str]
    """Path below `folder` -> SHA-256 of each file that was read."""

    def read(self, kind: str) -> pd.DataFrame:
        """Rows of one kind: gemm, decode_attention, prefill_attention, allreduce or moe.

        Raises:
            VoltanaError: No such table, a device that is not this card, or no bf16 rows.
        """
        path = self.folder / self.files[kind]
        if not path.is_file():
            raise VoltanaError(
                f"no {kind.replace('_', ' ')} table of {self.system.key}, {self.engine} "
                f"{self.version} ({path}): choose another --engine or --version"
            )
        data = path.read_bytes()
        self.digests[self.files[kind]] = hashlib.sha256(data).hexdigest()
        frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
        self._require_device(frame, path)
        for column, value in _ONLY[kind].items():
            if column in frame:
                frame = frame[frame[column] == value]
        if frame.empty:
            raise VoltanaError(f"{path} has no bf16 rows: choose another --engine or --version")
        return _one_kernel(frame) if "attention" in kind else frame

    def _require_device(self, frame: pd.DataFrame, path: Path) -> None:
        found = {str(d) for d in frame["device"].unique()} if "device" in frame else set()
        foreign = sorted(found - set(self.system.devices))
        if foreign:
            raise VoltanaError(
                f"a table of {self.system.key} must be measured on "
                f"{' or '.join(self.system.devices)}, got device {foreign[0]!r} ({path}): "
                "choose another --version, or the system that it was measured on"
            )


def open_tables(
    system: System, engine: str, wanted: str | None, folder: Path | None
) -> KernelTables:
    """Find the tables of a card.

    Args:
        system: The card.
        engine: sglang, vllm or trtllm.
        wanted: Version of the engine; None: the newest one that has the tables of a dense model.
        folder: `systems/data` of the wheel, anything above it, or an extract; None: the installed
            wheel.

    Raises:
        VoltanaError: No wheel and no folder, or no tables of this card, engine or version.
    """
    root, origin = _root(folder, system.key)
    files = _WHEEL_FILES if (root / system.key / "gemm").is_dir() else _EXTRACT_FILES
    versions = _versions(root / system.key, files, engine)
    if not versions:
        raise VoltanaError(f"no tables of {system.key} for engine {engine!r} in {root}")
    if wanted is not None and wanted not in versions:
        raise VoltanaError(
            f"no version {wanted!r} of {engine} in {root}{nearest(wanted, versions)}"
        )
    chosen = wanted or versions[-1]
    named = {kind: f.format(engine=engine, version=chosen) for kind, f in files.items()}
    return KernelTables(
        folder=root / system.key, files=named, system=system, engine=engine, version=chosen,
        origin=origin, digests={},
    )  # fmt: skip


def wheel_folder() -> Path | None:
    """Folder of the installed wheel, without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    found = spec.submodule_search_locations if spec else None
    return Path(next(iter(found))) if found else None


def _root(folder: Path | None, system: str) -> tuple[Path, str]:
    base = folder or wheel_folder()
    if base is None:
        raise VoltanaError(
            "no kernel tables: pip install 'voltana[tables]' (aiconfigurator-core), or name a "
            "folder of them with --tables"
        )
    origin = f"tables in {base.name}"
    if folder is None:
        try:
            origin = f"aiconfigurator-core {version('aiconfigurator-core')}"
        except PackageNotFoundError:
            origin = PACKAGE
    for under in ("", "data", _DATA, f"{PACKAGE}/{_DATA}", f"aic-core/src/{PACKAGE}/{_DATA}"):
        if (base / under / system).is_dir():
            return base / under, origin
    raise VoltanaError(f"no tables of {system} in {base}: --tables must name the folder above them")


def _versions(folder: Path, files: Mapping[str, str], engine: str) -> list[str]:
    """Those that a dense model's tables exist of, oldest first."""
    named = files["gemm"].format(engine=engine, version="*")
    head, tail = (re.escape(part) for part in named.split("*"))
    below = (path.relative_to(folder).as_posix() for path in folder.glob(named))
    found = [m[1] for m in (re.fullmatch(f"{head}(.+){tail}", text) for text in below) if m]
    needed = ("decode_attention", "prefill_attention")
    whole = [
        v for v in found
        if all((folder / files[k].format(engine=engine, version=v)).is_file() for k in needed)
    ]  # fmt: skip
    return sorted(whole, key=_version_key)


def _version_key(text: str) -> tuple[tuple[int, ...], int, str]:
    """Numbers first; a release candidate comes before its release."""
    numbers = re.match(r"[0-9.]*", text)
    parts = tuple(int(n) for n in (numbers[0] if numbers else "").split(".") if n)
    rest = text[len(numbers[0]) if numbers else 0 :]
    return parts, -1 if rest.startswith("rc") else 0, rest


def _one_kernel(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each head count the rows of one kernel: the table's most common one, where it is there."""
    if "kernel_source" not in frame:
        return frame
    ranked = {name: at for at, name in enumerate(frame["kernel_source"].value_counts().index)}
    rank = frame["kernel_source"].map(ranked)
    heads = ["num_heads", "num_key_value_heads", "head_dim"]
    return frame[rank == rank.groupby([frame[h] for h in heads]).transform("min")]
