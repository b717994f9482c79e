"""How many small faults the tests find: a random sample of mutmut's mutants of parts of `sim`.

mutmut changes one operator, constant, argument or call at a time. Here each such change is a
program of its own, in a copy of the project, and the tests run on it until the first one fails:
mutmut's own runner switches between mutants inside one program, and its switches make the
simulator's inner loops so slow that these could not be counted. A mutant that no test kills is
either the same program (a stable sort in place of any sort) or a gap. `make mutants` calls this.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mutmut.mutation.file_mutation import Mutation

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".mutants"
FOLDERS = ("sim", "profiles", "hwreplay", "experiments", "voltana", "tests")
FILES = ("README.md", "pyproject.toml")
PATIENCE = 4.0
"""A mutant whose tests take so many times as long as those of the program hangs: it is found."""
LEAST_S = 60.0
PASSED, FAILED, HANGS = "passed", "failed", "hangs"


@dataclass(frozen=True)
class Mutant:
    """One file with one change."""

    path: str
    """Below the project."""
    source: str
    changed: str
    """The lines that differ, with their number in the file."""


def main() -> None:
    """Draw the sample, run it, print the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", help="files or folders below sim/ to mutate")
    parser.add_argument("--tests", nargs="+", default=["tests/sim"], help="tests that may kill")
    parser.add_argument("--sample", type=int, default=400, help="mutants tried, at most")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    options = parser.parse_args()
    makers = [make for path in sorted(set(files_of(options.targets))) for make in mutants_of(path)]
    rng = np.random.default_rng(options.seed)
    picks = rng.choice(len(makers), min(options.sample, len(makers)), replace=False)
    chosen = [makers[pick]() for pick in picks]
    print(f"{len(makers)} mutants, {len(chosen)} tried", flush=True)
    ends: dict[Mutant, str] = {}
    try:
        run(chosen, options.tests, options.jobs, ends)
    except KeyboardInterrupt:
        print(f"interrupted: the first {len(ends)} of the sample", flush=True)
    report(dict(ends))


def files_of(targets: Sequence[str]) -> Iterator[str]:
    """Python files at or below the targets."""
    for target in targets:
        path = ROOT / target
        found = path.rglob("*.py") if path.is_dir() else [path]
        yield from (f.relative_to(ROOT).as_posix() for f in found if f.name != "__init__.py")


def mutants_of(path: str) -> Iterator[Callable[[], Mutant]]:
    """What mutmut makes of one file; writing a mutant out takes longer than finding it."""
    from mutmut.mutation.file_mutation import create_mutations  # only `make mutants` has it

    module, mutations, _, _ = create_mutations(path, (ROOT / path).read_text())

    def written(mutation: Mutation) -> Mutant:
        changed = module.deep_replace(mutation.original_node, mutation.mutated_node)
        source = module.code_for_node(changed)
        return Mutant(path, source, difference(module.code, source))

    yield from (partial(written, mutation) for mutation in mutations)


def difference(before: str, after: str) -> str:
    """The lines that differ, without the rest of a unified diff."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:3] not in ("---", "+++"))


def run(chosen: Sequence[Mutant], tests: Sequence[str], jobs: int, ends: dict[Mutant, str]) -> None:
    """Run the tests on each mutant.

    Args:
        chosen: What to try, in this order.
        tests: Files or folders.
        jobs: Mutants at a time.
        ends: Takes how the tests ended, as they end.
    """
    shutil.rmtree(WORK, ignore_errors=True)
    copies: SimpleQueue[Path] = SimpleQueue()
    for job in range(jobs):
        copies.put(copy_project(WORK / str(job)))
    begun_s = time.monotonic()
    if (end := pytest_in(WORK / "0", tests, None)) != PASSED:
        sys.exit(f"the tests must pass on the program as it is, and {end}: see {WORK}/0/output.txt")
    limit_s = max(PATIENCE * (time.monotonic() - begun_s), LEAST_S)

    def one(mutant: Mutant) -> None:
        copy = copies.get()
        path = copy / mutant.path
        path.write_text(mutant.source)
        ends[mutant] = pytest_in(copy, tests, limit_s)
        shutil.copy(ROOT / mutant.path, path)
        copies.put(copy)
        print(f"{len(ends)}: {ends[mutant]} {mutant.path}", file=sys.stderr, flush=True)

    pool = ThreadPoolExecutor(jobs)
    try:
        for ended in [pool.submit(one, mutant) for mutant in chosen]:
            ended.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def copy_project(to: Path) -> Path:
    """What the tests import and read; `voltana` holds links, which stay links into the copy."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, to / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, to)
    return to


def pytest_in(copy: Path, tests: Sequence[str], limit_s: float | None) -> str:
    """Run the tests on a copy until one fails; it is imported from there, being the folder."""
    options = ("-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-B", "-m", "pytest", *options, *tests]
    with (copy / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=copy, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return FAILED if process.wait(limit_s) else PASSED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return HANGS


def report(ends: Mapping[Mutant, str]) -> None:
    """The share killed by file, and what each survivor changed."""
    print("| file | tried | killed | share |\n| --- | --- | --- | --- |")
    for path in [*sorted({mutant.path for mutant in ends}), ""]:
        of = [end for mutant, end in ends.items() if mutant.path.startswith(path)]
        killed = sum(end != PASSED for end in of)
        print(f"| {path or 'all'} | {len(of)} | {killed} | {killed / max(len(of), 1):.0%} |")
    for mutant, end in ends.items():
        if end == PASSED:
            print(f"\n{mutant.path}\n{mutant.changed}")


if __name__ == "__main__":
    main()
