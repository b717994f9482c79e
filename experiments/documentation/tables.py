"""Tables of the documentation, written by the code that they describe.

A page holds `<!-- table: NAME -->`; `mkdocs` calls `on_page_markdown` through `mkdocs.yml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from voltana.experiments.documentation.class_keys import keys_table
from voltana.experiments.study.suite import list_experiments
from voltana.profiles.catalog import list_profiles, load_profile
from voltana.profiles.common.errors import VoltanaError, nearest
from voltana.profiles.common.markdown import markdown_table
from voltana.sim.config import KEYS, SimConfig
from voltana.sim.policies.registry import CONTROLLERS, ROUTERS, SCALERS, Entry
from voltana.sim.workload.generate import list_workloads

_MARK: Final = re.compile(r"<!-- table: ([a-z-]+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401 (mkdocs passes its objects)
    """Replace each mark of a page by its table.

    Raises:
        VoltanaError: A mark names no table.
    """
    return _MARK.sub(lambda found: table(found[1]), markdown)


def table(name: str) -> str:
    """One table in Markdown."""
    if name not in TABLES:
        raise VoltanaError(f"no table {name!r}{nearest(name, TABLES)}")
    return TABLES[name]()


def policy_rows(entries: Mapping[str, Entry[Any]]) -> str:
    """Name, rule, source, and where the constants come from, of each policy."""
    return markdown_table(
        ("name", "rule", "constants", "source"),
        [
            (f"`{name}`", entry.rule, entry.constants, entry.source)
            for name, entry in entries.items()
        ],
    )


def _parameters(entries: Mapping[str, Entry[Any]]) -> str:
    parts = []
    for name, entry in entries.items():
        infos = entry.parameter_infos
        if infos:
            rows = [(f"`{i.key}`", i.default, i.unit, i.meaning) for i in infos]
            heads = ("parameter", "default", "unit", "meaning")
            parts.append(f"**`{name}`**\n\n{markdown_table(heads, rows)}")
    return "\n\n".join(parts)


def _keys() -> str:
    defaults = SimConfig().as_dict()
    rows = [(f"`{key}`", f"`{defaults.get(key, 'none')}`", text) for key, text in KEYS.items()]
    return markdown_table(("key", "default", "meaning"), rows)


def _profiles() -> str:
    rows = []
    for name in list_profiles():
        meta = load_profile(name).meta
        clocks = meta.clocks.supported_mhz
        statuses = sorted({p.status for p in meta.provenance.values()})
        rows.append(
            (f"`{name}`", meta.gpu.name, meta.model.name, str(meta.model.tensor_parallel),
             f"{clocks[0]} to {clocks[-1]}", ", ".join(statuses))
        )  # fmt: skip
    return markdown_table(("name", "GPU", "model", "TP", "clocks (MHz)", "status"), rows)


def _experiments() -> str:
    rows = [(f"`{name}`", question) for name, question in list_experiments().items()]
    return markdown_table(("name", "question"), rows)


def _workloads() -> str:
    rows = [(f"`{name}`", text) for name, text in list_workloads().items()]
    return markdown_table(("name", "lengths"), rows)


ROUTER: Final = frozenset(
    ("workers", "sim", "token", "events", "reports", "start_ns", "listen_fd", "state_file")
)
"""Of the router's configuration: what stands in other tables, or is between processes."""
TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "controllers": lambda: policy_rows(CONTROLLERS),
    "routers": lambda: policy_rows(ROUTERS),
    "scalers": lambda: policy_rows(SCALERS),
    "controller-parameters": lambda: _parameters(CONTROLLERS),
    "router-parameters": lambda: _parameters(ROUTERS),
    "scaler-parameters": lambda: _parameters(SCALERS),
    "configuration": _keys,
    "profiles": _profiles,
    "experiments": _experiments,
    "workloads": _workloads,
    "router-keys": lambda: keys_table("hwreplay/router/config.py", "RouterConfig", ROUTER),
    "server-keys": lambda: keys_table(
        "hwreplay/router/config.py", "WorkerConfig", frozenset(("phase", "instance_id"))
    ),
    "service-keys": lambda: keys_table(
        "hwreplay/serve/config.py",
        "ServeConfig",
        frozenset(("fleet",)),
        constants_of="hwreplay/agent/guard.py",
    ),
}
