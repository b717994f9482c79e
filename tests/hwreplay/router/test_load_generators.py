"""Load generators as they are, against the router, and what is read of what they write.

bench_serving comes with `make engine`; aiperf and guidellm need gigabytes: from the PATH, if there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.hwreplay.conftest import ENGINE
from tests.hwreplay.router.test_router import bench
from tests.hwreplay.stub_worker import StubTimes
from voltana.sim.metrics import summarise
from voltana.sim.workload.benchmarks import read_one

TIMES = StubTimes(prefill_base_s=0.01, decode_base_s=0.004)
REQUESTS = 8
OUTPUT_TOKENS = 6
LIMIT_S = 900.0
AIPERF_PATIENCE = {
    f"AIPERF_SERVICE_{name}": "600"
    for name in ("REGISTRATION_TIMEOUT", "PROFILE_START_TIMEOUT", "COMMAND_RESPONSE_TIMEOUT")
}
"""Seconds. Its services have 30 and 60 s to start, which a machine with much else to do exceeds."""
MAKE_TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(400)}
made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
).save_pretrained(sys.argv[1])
"""
RUN_BENCH = """
import runpy
del sys.argv[1]
runpy.run_module("sglang.bench_serving", run_name="__main__")
"""
NO_DATASETS = '''"""Random prompts need no data set, and the package is not installed."""


def load_dataset(*_, **__):
    raise RuntimeError
'''


async def call(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=folder, env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = await asyncio.wait_for(process.communicate(), LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, said.decode()[-4000:]


@pytest.mark.engine
@pytest.mark.slow
def test_bench_serving(tmp_path: Path) -> None:
    python = ENGINE / "venv" / "bin" / "python"
    if not (ENGINE / ".installed").is_file():
        pytest.skip("SGLang is not installed: run `make engine`")
    (tmp_path / "datasets.py").write_text(NO_DATASETS)
    out = tmp_path / "out.jsonl"

    async def play() -> None:
        async with bench(1, 2, times=TIMES) as b:
            await call(
                [str(python), "-c", MAKE_TOKENIZER + RUN_BENCH, "tokenizer",
                 "--backend", "sglang-oai-chat", "--base-url", b.url, "--model", "stub",
                 "--tokenizer", "tokenizer", "--dataset-name", "random-ids",
                 "--random-input-len", "20", "--random-output-len", str(OUTPUT_TOKENS),
                 "--random-range-ratio", "1.0", "--num-prompts", str(REQUESTS),
                 "--output-file", str(out), "--output-details"],
                {"PYTHONPATH": str(tmp_path)}, tmp_path,
            )  # fmt: skip
            check(out)

    asyncio.run(play())


def check(path: Path) -> None:
    """All are answered, none faster than the stub servers' stated times."""
    summary = summarise(read_one(path).record(slo_ttft_s=60.0, slo_itl_s=60.0))
    assert summary["requests_completed"] == summary["requests_total"] == REQUESTS
    assert summary["attainment"] == 1.0
    assert summary["ttft_s"]["p50"] >= TIMES.prefill_base_s + TIMES.decode_base_s
    least_s = summary["ttft_s"]["p50"] + (OUTPUT_TOKENS - 2) * TIMES.decode_base_s
    assert summary["e2e_s"]["p90"] >= least_s
    assert summary["throughput_tokens_per_s"] > 0


@pytest.mark.slow
def test_aiperf(tmp_path: Path) -> None:
    program = shutil.which("aiperf")
    if program is None:
        pytest.skip("aiperf is not on the PATH: pip install aiperf")
    python = Path(program).with_name("python")

    async def play() -> None:
        await call([str(python), "-c", MAKE_TOKENIZER, "tokenizer"], {}, tmp_path)
        async with bench(1, 2, times=TIMES) as b:
            await call(
                [program, "profile", "--model", "stub", "--url", b.url, "--endpoint-type", "chat",
                 "--streaming", "--tokenizer", str(tmp_path / "tokenizer"),
                 "--request-count", str(REQUESTS), "--concurrency", "2",
                 "--synthetic-input-tokens-mean", "20",
                 "--output-tokens-mean", str(OUTPUT_TOKENS), "--ui", "none",
                 "--artifact-dir", str(tmp_path / "artifacts")],
                AIPERF_PATIENCE, tmp_path,
            )  # fmt: skip
            check(tmp_path / "artifacts")

    asyncio.run(play())


@pytest.mark.slow
def test_guidellm(tmp_path: Path) -> None:
    program = shutil.which("guidellm")
    if program is None:
        pytest.skip("guidellm is not on the PATH: pip install guidellm")
    python = Path(program).with_name("python")

    async def play() -> None:
        await call([str(python), "-c", MAKE_TOKENIZER, "tokenizer"], {}, tmp_path)
        async with bench(1, 2, times=TIMES) as b:
            await call(
                [program, "run", "--backend", f"kind=openai_http,target={b.url},model=stub",
                 "--tokenizer", f"kind=hf_auto,model={tmp_path / 'tokenizer'}",
                 "--profile", "kind=concurrent,streams=2",
                 "--constraint", f"kind=max_requests,count={REQUESTS}",
                 "--data", f"kind=synthetic_text,prompt_tokens=20,output_tokens={OUTPUT_TOKENS}",
                 "--output", f"kind=json,path={tmp_path / 'benchmarks.json'}",
                 "--disable-console"],
                {}, tmp_path,
            )  # fmt: skip
            check(tmp_path / "benchmarks.json")

    asyncio.run(play())
