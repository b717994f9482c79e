"""Published traces by name: from a folder of the user's, or downloaded at the user's request."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import requests

from voltana.profiles.common.errors import VoltanaError, nearest

FOLDER_VARIABLE: Final = "VOLTANA_DATA"
"""Environment variable: a folder that holds traces, itself or in its subfolder `traces`."""

_AZURE: Final = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/"
    "b469a113cedca53ddc3bdea71a143dc4b7d8700c/data/"
)
_MOONCAKE: Final = (
    "https://raw.githubusercontent.com/kvcache-ai/Mooncake/"
    "3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces/"
)


class MissingTraceError(VoltanaError):
    """A trace that is not in the user's folder and cannot be downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTrace:
    """Where a published trace is, and the hash of its bytes."""

    url: str
    sha256: str
    licence: str
    citation: str
    plain_name: str | None = None
    """File name of the same requests as plain CSV (arrival_s, input_tokens, output_tokens)."""
    plain_sha256: str | None = None

    @property
    def published_name(self) -> str:
        """File name at the source."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def local_files(self) -> dict[str, str]:
        """File names it is looked for under in the user's folder -> SHA-256."""
        files = {self.published_name: self.sha256}
        if self.plain_name is not None and self.plain_sha256 is not None:
            files[self.plain_name] = self.plain_sha256
        return files


TRACES: Final[Mapping[str, NamedTrace]] = {
    "azure-conv-2023": NamedTrace(
        url=_AZURE + "AzureLLMInferenceTrace_conv.csv",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        licence="CC-BY-4.0",
        citation="Patel et al., Splitwise, ISCA 2024",
        plain_name="azure_llm_2023_conv.csv.gz",
        plain_sha256="f9bb0b7080cccce85cf2930b08b58f9acfa3f3bc3dbf1f1d3325aed99b64e9e6",
    ),
    "azure-code-2023": NamedTrace(
        url=_AZURE + "AzureLLMInferenceTrace_code.csv",
        sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        licence="CC-BY-4.0",
        citation="Patel et al., Splitwise, ISCA 2024",
        plain_name="azure_llm_2023_code.csv.gz",
        plain_sha256="08e23733311bf2628f63e3f7bacf9ee8cef3998356a419da8bb774f08243c47e",
    ),
    "mooncake-conversation": NamedTrace(
        url=_MOONCAKE + "conversation_trace.jsonl",
        sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        licence="Apache-2.0",
        citation="Qin et al., Mooncake, FAST 2025",
        plain_name="mooncake_conversation.csv.gz",
        plain_sha256="22c96f454b4a453bc193f725c0ddef09da0515c64da18dedbd564d0604984a2c",
    ),
    "mooncake-synthetic": NamedTrace(
        url=_MOONCAKE + "synthetic_trace.jsonl",
        sha256="bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
        licence="Apache-2.0",
        citation="Qin et al., Mooncake, FAST 2025",
        plain_name="mooncake_synthetic.csv.gz",
        plain_sha256="4bcfe5259f9aebec0a9116f5494387d1a8eef73fdd1e5900b04cf2cf79f9e924",
    ),
}


def named_traces() -> list[str]:
    """Names that `named_trace` knows."""
    return sorted(TRACES)


def named_trace(name: str, traces: Mapping[str, NamedTrace] = TRACES) -> Path:
    """The file of a published trace: from the folder VOLTANA_DATA names, else downloaded.

    Either is checked against its SHA-256. A download goes to the user's cache; it happens only
    here.

    Raises:
        VoltanaError: Unknown name, no connection, or a file whose hash is wrong.
    """
    trace = traces.get(name)
    if trace is None:
        raise VoltanaError(f"unknown trace {name!r}{nearest(name, traces)}")
    local = _in_folder(trace)
    if local is not None:
        return local
    import pooch  # slow to import, and only a download needs it

    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(
            pooch.retrieve(
                trace.url,
                known_hash=f"sha256:{trace.sha256}",
                fname=f"{name}-{trace.published_name}",
                path=pooch.os_cache("voltana"),
                progressbar=False,
            )
        )
    except requests.RequestException as error:
        raise MissingTraceError(
            f"cannot download {name} from {trace.url} ({type(error).__name__}): get the file "
            f"elsewhere and set {FOLDER_VARIABLE} to its folder"
        ) from None
    except ValueError as error:
        raise VoltanaError(
            f"{name} was downloaded but is not the published file: {str(error).splitlines()[0]}"
        ) from None


def is_here(name: str) -> bool:
    """Whether a published trace needs no download: in the user's folder, or fetched before."""
    import pooch

    cached = Path(pooch.os_cache("voltana")) / f"{name}-{TRACES[name].published_name}"
    return _in_folder(TRACES[name]) is not None or cached.is_file()


def in_data_folder(file_name: str) -> Path | None:
    """A file of that name in the folder that VOLTANA_DATA names, or in its subfolder `traces`."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    places = (Path(folder) / file_name, Path(folder) / "traces" / file_name)
    return next((path for path in places if path.is_file()), None)


def _in_folder(trace: NamedTrace) -> Path | None:
    for name, sha256 in trace.local_files.items():
        path = in_data_folder(name)
        if path is not None:
            if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                raise VoltanaError(
                    f"{path} is not the published file (its SHA-256 is not {sha256[:12]}…): "
                    "get it again, or pass the file's path to use it as it is"
                )
            return path
    return None
