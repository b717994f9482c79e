"""Published traces by name: from a folder of the user's, or downloaded at the user's request."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pooch
import requests

from profiles.errors import VoltanaError, nearest

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


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTrace:
    """Where a published trace lives, pinned to the byte."""

    url: str
    sha256: str
    licence: str
    citation: str
    local_names: tuple[str, ...]
    """File names it is looked for under in the user's folder."""


TRACES: Final[Mapping[str, NamedTrace]] = {
    "azure-conv-2023": NamedTrace(
        url=_AZURE + "AzureLLMInferenceTrace_conv.csv",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        licence="CC-BY-4.0",
        citation="Patel et al., Splitwise, ISCA 2024",
        local_names=("AzureLLMInferenceTrace_conv.csv", "azure_llm_2023_conv.csv.gz"),
    ),
    "azure-code-2023": NamedTrace(
        url=_AZURE + "AzureLLMInferenceTrace_code.csv",
        sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        licence="CC-BY-4.0",
        citation="Patel et al., Splitwise, ISCA 2024",
        local_names=("AzureLLMInferenceTrace_code.csv", "azure_llm_2023_code.csv.gz"),
    ),
    "mooncake-conversation": NamedTrace(
        url=_MOONCAKE + "conversation_trace.jsonl",
        sha256="b8cbb061a85206d729d91cdc2981f43c9e0d99209dce588d3af5f7934408b9df",
        licence="Apache-2.0",
        citation="Qin et al., Mooncake, FAST 2025",
        local_names=("conversation_trace.jsonl", "mooncake_conversation.csv.gz"),
    ),
    "mooncake-synthetic": NamedTrace(
        url=_MOONCAKE + "synthetic_trace.jsonl",
        sha256="bd070915a98fc0ed264d7cfef2ce746002eb3076a695ec31ba2674c0111ec131",
        licence="Apache-2.0",
        citation="Qin et al., Mooncake, FAST 2025",
        local_names=("synthetic_trace.jsonl", "mooncake_synthetic.csv.gz"),
    ),
}


def named_traces() -> list[str]:
    """Names that `named_trace` knows."""
    return sorted(TRACES)


def named_trace(name: str, traces: Mapping[str, NamedTrace] = TRACES) -> Path:
    """The file of a published trace: from the folder VOLTANA_DATA names, else downloaded.

    A download goes to the user's cache and is checked against its SHA-256; it happens only here.

    Raises:
        VoltanaError: Unknown name, no connection, or a download whose hash is wrong.
    """
    trace = traces.get(name)
    if trace is None:
        raise VoltanaError(f"unknown trace {name!r}{nearest(name, traces)}")
    local = _in_folder(trace)
    if local is not None:
        return local
    pooch.get_logger().setLevel("WARNING")
    try:
        return Path(
            pooch.retrieve(
                trace.url,
                known_hash=f"sha256:{trace.sha256}",
                fname=f"{name}-{trace.local_names[0]}",
                path=pooch.os_cache("voltana"),
                progressbar=False,
            )
        )
    except requests.RequestException as error:
        raise VoltanaError(
            f"cannot download {name} from {trace.url} ({type(error).__name__}): get the file "
            f"elsewhere and set {FOLDER_VARIABLE} to its folder"
        ) from None
    except ValueError as error:
        raise VoltanaError(
            f"{name} was downloaded but is not the published file: {str(error).splitlines()[0]}"
        ) from None


def _in_folder(trace: NamedTrace) -> Path | None:
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return None
    for directory in (Path(folder), Path(folder) / "traces"):
        for name in trace.local_names:
            if (directory / name).is_file():
                return directory / name
    return None
