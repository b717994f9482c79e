"""How many small faults the tests find: mutmut over parts of `sim`, a random sample of its mutants.

mutmut changes one operator, constant, argument or call at a time and runs the tests that pass
through the changed function. A mutant that no test kills is either the same program (a stable
sort in place of any sort) or a gap. All happens in a copy, `.mutants/`; `make mutants` calls this.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".mutants"
FOLDERS = ("sim", "profiles", "hwreplay", "experiments")
KILLED, SURVIVED = ("🎉", "⏰"), ("🙁", "🫥")
"""mutmut's marks: failed a test or ran out of time; passed all tests, or none ran through it."""
_QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
"""mutmut runs pytest repeatedly in one process, which has then imported its plugins already."""


def main() -> None:
    """Draw the sample, run it, print the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", help="files or folders below sim/ to mutate")
    parser.add_argument("--tests", nargs="+", default=["tests/sim"], help="tests that may kill")
    parser.add_argument("--sample", type=int, default=400, help="mutants tried, at most")
    parser.add_argument("--seed", type=int, default=1, help="of the sample")
    options = parser.parse_args()
    files = sorted(set(files_of(options.targets)))
    copy_project(files, options.tests)
    names = [name for path in files for name in mutants_of(path)]
    rng = np.random.default_rng(options.seed)
    chosen = rng.choice(names, min(options.sample, len(names)), replace=False).tolist()
    print(f"{len(names)} mutants of {len(files)} files, {len(chosen)} tried", flush=True)
    marks = run_mutmut(chosen)
    report(marks)


def files_of(targets: Sequence[str]) -> Iterator[str]:
    """Python files at or below the targets, as the modules are called."""
    for target in targets:
        path = ROOT / target
        found = path.rglob("*.py") if path.is_dir() else [path]
        paths = (f.relative_to(ROOT).as_posix() for f in found if f.name != "__init__.py")
        yield from (f"voltana/{path}" for path in paths)


def copy_project(files: Sequence[str], tests: Sequence[str]) -> None:
    """A fresh copy of the sources with mutmut's settings.

    mutmut names a module by its path, so the package is copied whole and not by its links. The
    folders beside it are what tests read as files.
    """
    shutil.rmtree(WORK, ignore_errors=True)
    for name in ("voltana", "tests", *FOLDERS):
        shutil.copytree(ROOT / name, WORK / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", WORK)
    settings = {
        "source_paths": ["voltana"],
        "only_mutate": list(files),
        "also_copy": [*FOLDERS, "README.md"],
        "pytest_add_cli_args_test_selection": list(tests),
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-m", "not slow", *_QUIET],
    }
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    project = (ROOT / "pyproject.toml").read_text()
    (WORK / "pyproject.toml").write_text("\n".join([project, "[tool.mutmut]", *lines, ""]))


def mutants_of(path: str) -> list[str]:
    """Names of the mutants of one file, as mutmut's command line takes them."""
    from mutmut.mutation.file_mutation import mutate_file_contents  # only `make mutants` has it

    os.chdir(WORK)
    module = path.removesuffix(".py").replace("/", ".")
    names = mutate_file_contents(path, Path(path).read_text()).mutant_names
    return [f"{module}.{name}" for name in names]


def run_mutmut(names: Sequence[str]) -> dict[str, str]:
    """Each mutant's mark; one process, so that no mutant's time limit hangs on another."""
    command = [Path(sys.executable).parent / "mutmut", "run", "--max-children", "1", *names]
    ended = subprocess.run(command, cwd=WORK, check=False, capture_output=True, text=True)
    lines = [line.split() for line in ended.stdout.splitlines()]
    marks = {line[1]: line[0] for line in lines if len(line) == 2 and line[1] in set(names)}
    if len(marks) != len(names):
        sys.exit(f"mutmut ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr}")
    return marks


def report(marks: dict[str, str]) -> None:
    """The share killed by module, and what each survivor changed."""
    modules = sorted({name.rpartition(".")[0] for name in marks})
    print("| module | tried | killed | share |\n| --- | --- | --- | --- |")
    for module in [*modules, "voltana"]:
        of = [mark for name, mark in marks.items() if name.startswith(f"{module}.")]
        killed = sum(mark in KILLED for mark in of)
        print(f"| {module} | {len(of)} | {killed} | {100 * killed / len(of):.0f} % |")
    for name in sorted(n for n, mark in marks.items() if mark in SURVIVED):
        command = [Path(sys.executable).parent / "mutmut", "show", name]
        shown = subprocess.run(command, cwd=WORK, check=True, capture_output=True, text=True)
        changed = [line for line in shown.stdout.splitlines() if line[:1] in ("-", "+")]
        print(f"\n{name} {'(no test)' if marks[name] == '🫥' else ''}")
        print("\n".join(line for line in changed if line[:3] not in ("---", "+++")))


if __name__ == "__main__":
    main()
