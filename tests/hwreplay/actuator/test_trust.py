"""Root runs nothing that another user may change; and the actuator's own entry needs little."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from voltana.hwreplay.actuator import trust
from voltana.hwreplay.actuator.trust import check_code, find_changeable, loaded_paths
from voltana.profiles.common.errors import VoltanaError


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A file in a folder, both of this user's alone."""
    folder = tmp_path / "package"
    folder.mkdir(mode=0o755)
    file = folder / "module.py"
    file.write_text("")
    file.chmod(0o644)
    return file


def found(path: Path) -> Path | None:
    return find_changeable([path], trusted_uid=os.getuid())


def test_files_and_folders_that_others_may_write(module: Path) -> None:
    assert found(module) is None
    module.chmod(0o646)
    assert found(module) == module
    module.chmod(0o644)
    module.parent.chmod(0o757)
    assert found(module) == module.parent
    module.parent.chmod(0o1777)  # like /tmp: nobody renames another's file there
    assert found(module) is None


def test_a_link_counts_where_it_stands(
    module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code is root's alone, but others may point the name that is run at something else."""
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o755)
    (folder / "current").symlink_to(module.parent)
    monkeypatch.setattr(sys, "executable", str(folder / "current" / module.name))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "modules", {})
    assert find_changeable(loaded_paths(), trusted_uid=os.getuid()) is None
    folder.chmod(0o757)
    assert find_changeable(loaded_paths(), trusted_uid=os.getuid()) == folder


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give files away")
def test_owners_and_groups_other_than_roots(module: Path) -> None:
    os.chown(module, 12345, 0)
    assert found(module) == module
    os.chown(module, 0, 12345)
    assert found(module) is None  # the group may only read
    module.chmod(0o664)
    assert found(module) == module
    os.chown(module, 0, 0)
    assert found(module) is None


def test_root_refuses_and_others_do_not_care(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.chmod(0o666)
    monkeypatch.setattr(trust, "loaded_paths", lambda: [module])
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(VoltanaError, match=r"writable by root alone, .*: install the actuator in"):
        check_code()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_code()


def test_what_is_loaded_is_looked_at() -> None:
    paths = loaded_paths()
    assert Path(trust.__file__).resolve() in paths
    assert Path(sys.executable).resolve() in paths


def test_the_entry_for_root_imports_little_and_serves(tmp_path: Path) -> None:
    code = (
        "import sys, voltana.hwreplay.actuator.__main__\n"
        "print(sorted({'numpy', 'pandas', 'typer', 'zmq', 'msgspec', 'sim'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "[]\n"
    command = [
        sys.executable,
        "-P",
        "-m",
        "voltana.hwreplay.actuator",
        str(tmp_path / "s"),
        "--gpu",
        "0",
    ]
    command += ["--dry-run", str(tmp_path / "changes"), "--allow-writable-code"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith(f"listening on {tmp_path}/s for user ")
        assert (tmp_path / "s").is_socket()
        process.terminate()
        process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    wrong = subprocess.run(
        [*command, "--clocks", "fast"], capture_output=True, text=True, check=False, env=environment
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("voltana actuator: --clocks must be whole MHz")
