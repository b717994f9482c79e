"""An agent beside Dynamo: records that Dynamo's own code made and sent.

`pip install --no-deps ai-dynamo` is enough: two of its files are run as they are, and nothing that
they are part of. vLLM, which the second one schedules for, is not needed by its publisher.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from tests.hwreplay.actuator.conftest import eventually
from tests.hwreplay.agent.test_attach import attached
from tests.hwreplay.view.test_tracker import UPSTREAM
from tests.profiles.conftest import library_dir, standin  # noqa: F401 (fixtures)
from tests.profiles.device.standin import Standin
from voltana.profiles.engines.sglang_metrics import MetricsError, parse_metrics

SCHEMA = "common/forward_pass_metrics.py"
SCHEDULER = "vllm/instrumented_scheduler.py"
PUBLISHER = "_FpmPublisherThread"


@pytest.fixture(scope="module")
def package() -> Path:
    found = importlib.util.find_spec("dynamo")
    for folder in [] if found is None else found.submodule_search_locations or []:
        if (Path(folder) / SCHEMA).is_file():
            return Path(folder)
    pytest.skip("Dynamo is not installed: pip install --no-deps ai-dynamo")


@pytest.fixture(scope="module")
def schema(package: Path) -> Iterator[Any]:
    """The file alone: the package around it wants Dynamo's runtime."""
    spec = importlib.util.spec_from_file_location("dynamo_records", package / SCHEMA)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # msgspec looks its annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_its_bytes_are_those_that_we_read(schema: Any) -> None:  # noqa: ANN401
    record = schema.ForwardPassMetrics(
        worker_id="decode-0",
        counter_id=7,
        wall_time=0.0031,
        scheduled_requests=schema.ScheduledRequestMetrics(
            num_decode_requests=3, sum_decode_kv_tokens=120
        ),
        queued_requests=schema.QueuedRequestMetrics(num_decode_requests=2, sum_decode_kv_tokens=33),
    )
    assert schema.encode(record) == UPSTREAM
    for name, seen in (("num_prefill_requests", "num_prefill_requests"),
                       ("sum_prefill_tokens", "sum_prefill_tokens"),
                       ("sum_prefill_kv_tokens", "sum_prefill_kv_tokens")):  # fmt: skip
        scheduled = schema.ScheduledRequestMetrics(**{name: 5})
        one = schema.ForwardPassMetrics(scheduled_requests=scheduled)
        assert getattr(parse_metrics(schema.encode(one), received_s=0.0), seen) == 5
    later = schema.ForwardPassMetrics(version=schema.FPM_VERSION + 1)
    with pytest.raises(MetricsError, match="must have version 1, got 2"):
        parse_metrics(schema.encode(later), received_s=0.0)


def publisher_of(package: Path, schema: Any) -> Any:  # noqa: ANN401
    """The class that sends a vLLM worker's records, out of the file that imports vLLM."""
    tree = ast.parse((package / SCHEDULER).read_text())
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == PUBLISHER]
    names: dict[str, Any] = {
        "queue": queue, "count": count, "threading": threading, "time": time, "zmq": zmq,
        "msgspec": msgspec, "logger": logging.getLogger("dynamo"), "encode": schema.encode,
        "ForwardPassMetrics": schema.ForwardPassMetrics,
    }  # fmt: skip
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *found], []), SCHEDULER, "exec"), names)
    return names[PUBLISHER]


@pytest.mark.slow
def test_an_agent_follows_a_worker_of_dynamo_at_work_and_at_rest(
    package: Path,
    schema: Any,  # noqa: ANN401
    standin: Standin,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As on a worker with DYN_FORWARDPASS_METRIC_PORT: over TCP, with its heartbeats."""
    publisher = publisher_of(package, schema)("tcp://127.0.0.1:*", "worker", 0)
    address = publisher._pub.getsockopt_string(zmq.LAST_ENDPOINT)
    one = schema.ForwardPassMetrics(
        wall_time=0.01,
        scheduled_requests=schema.ScheduledRequestMetrics(
            num_decode_requests=4, sum_decode_kv_tokens=2000
        ),
    )
    try:
        with attached(standin, tmp_path, address) as shadow:
            assert eventually(lambda: len(shadow.lines()) > 0)

            def decided() -> bool:
                publisher.publish(one)
                return shadow.metrics().get("voltana_decisions_total", 0) > 20

            assert eventually(decided)
            found = shadow.metrics()
            assert found["voltana_output_tokens_total"] == 4 * found["voltana_iterations_total"]
            assert found["voltana_wished_clock_mhz"] == 1005
            time.sleep(3.0)  # at rest: without its heartbeats the agent would be safe for good
            assert eventually(lambda: shadow.metrics()["voltana_safe_state"] == 0)
    finally:
        publisher.shutdown()
