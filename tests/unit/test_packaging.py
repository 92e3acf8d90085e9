# SPDX-License-Identifier: Apache-2.0
"""The package as it is installed: its list of packages, its version, its files for operators, its change log."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import vmloop
from vmloop.broker.ending import SHUTDOWN_SECONDS, STOP_GRACE
from vmloop.broker.loop import FAREWELL_SECONDS, ZYGOTE_SECONDS
from vmloop.client.cli.main import vmloop as cli

from ..__main__ import COMPUTING, WAITING

ROOT = Path(vmloop.__file__).parent
NO_PACKAGES = {"tests", "docs", "deploy", "build", "dist"}


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_code() -> set[str]:
    found = {"vmloop"}
    for top in ROOT.iterdir():
        if top.is_dir() and top.name not in NO_PACKAGES and not top.name.startswith("."):
            found |= {
                ".".join(["vmloop", *file.parent.relative_to(ROOT).parts])
                for file in top.rglob("*.py")
                if "__pycache__" not in file.parts
            }
    return found


def test_the_list_of_packages_equals_the_folders() -> None:
    listed = pyproject()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == folders_with_code()


def test_every_package_has_an_init() -> None:
    for package in folders_with_code():
        assert (ROOT / Path(*package.split(".")[1:]) / "__init__.py").is_file(), package


def test_the_installed_version_is_the_one_in_the_source() -> None:
    assert importlib.metadata.version("vmloop") == vmloop.__version__


def test_the_python_version_is_said_alike_everywhere() -> None:
    project = pyproject()
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["ruff"]["target-version"] == "py311"
    assert project["tool"]["mypy"]["python_version"] == "3.11"


def test_the_types_are_shipped() -> None:
    assert (ROOT / "py.typed").is_file()
    assert pyproject()["tool"]["setuptools"]["package-data"]["vmloop"] == ["py.typed"]


def test_the_change_log_begins_with_what_is_not_released() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## Unreleased"


def test_the_license_is_the_one_named() -> None:
    assert pyproject()["project"]["license"] == {"text": "Apache-2.0"}
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]


@pytest.mark.parametrize("script", ["deploy/bootstrap", ".ci/run"])
def test_scripts_can_be_run_and_parsed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=30)


def test_bootstrap_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(
        [ROOT / "deploy/bootstrap", "--strcit"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr


def bootstrap(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run deploy/bootstrap with no other programs than those in a folder."""
    return subprocess.run(
        ["/bin/bash", ROOT / "deploy/bootstrap", *arguments],
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def fake_debian(folder: Path, *, missing: str, apt_get: str) -> Path:
    """Programs of a Debian on which one package is missing until the file `installed` is there."""
    (folder / "bin").mkdir()
    for name in ("env", "timeout", "touch"):
        (folder / "bin" / name).symlink_to(f"/usr/bin/{name}")
    program(folder / "bin/dpkg", "echo amd64")
    program(
        folder / "bin/dpkg-query",
        f'if [[ "${{@: -1}}" == "{missing}" && ! -e {folder}/installed ]]; then exit 1; fi; echo -n installed',
    )
    program(folder / "bin/apt-get", f'echo "apt-get $*" >> {folder}/calls\n{apt_get}')
    program(folder / "bin/sudo", 'if [[ "$2" == true ]]; then exit 0; fi; exec "${@:2}"')
    return folder / "bin"


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--strict"], 1)])
def test_bootstrap_elsewhere_says_what_is_needed_and_fails_only_when_strict(
    tmp_path: Path, arguments: list[str], code: int
) -> None:
    done = bootstrap(tmp_path, *arguments)  # no apt-get, no dpkg-query
    assert done.returncode == code
    assert "qemu-system-x86" in done.stderr


def test_bootstrap_does_nothing_where_all_is_there(tmp_path: Path) -> None:
    done = bootstrap(fake_debian(tmp_path, missing="none", apt_get="exit 1"), "--strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "calls").exists()


def test_bootstrap_installs_only_what_is_missing(tmp_path: Path) -> None:
    apt_get = f'if [[ "$*" == *install* ]]; then touch {tmp_path}/installed; fi'
    done = bootstrap(fake_debian(tmp_path, missing="kmod", apt_get=apt_get), "--strict")
    assert done.returncode == 0, done.stderr
    update, install = (tmp_path / "calls").read_text().splitlines()
    assert update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends kmod")
    assert "DPkg::Lock::Timeout=300" in install


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--strict"], 1)])
def test_bootstrap_that_cannot_install_prints_the_one_command(tmp_path: Path, arguments: list[str], code: int) -> None:
    done = bootstrap(fake_debian(tmp_path, missing="kmod", apt_get="exit 100"), *arguments)
    assert done.returncode == code
    assert "run: sudo apt-get install -y --no-install-recommends kmod\n" in done.stderr


def test_the_unit_of_one_vm_gives_its_guest_the_time_to_power_down() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((ROOT / "deploy/vmloop@.service").read_text())
    service = unit["Service"]
    words = service["ExecStart"].replace("%i", "web1").split()
    root, limit = words[words.index("--root") + 1], float(words[words.index("--stop-timeout") + 1])
    assert Path(root) == Path("/var/lib") / service["StateDirectory"].replace("%i", "web1")
    ending = limit + STOP_GRACE + SHUTDOWN_SECONDS + FAREWELL_SECONDS + 2 * ZYGOTE_SECONDS
    assert ending < float(service["TimeoutStopSec"])
    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "main", "mixed")
    with cli.make_context("vmloop", words[1:]) as context:
        command = cli.get_command(context, "run")
        assert command is not None
        command.make_context("run", words[words.index("run") + 1 :], parent=context)


def test_the_service_unit_lets_workers_and_vms_outlive_the_broker() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string((ROOT / "deploy/vmloop.service").read_text())
    service = unit["Service"]
    assert service["ExecStart"] == "vmloop broker"
    assert service["Type"] == "notify"
    assert service["KillMode"] == "process"
    assert service["Restart"] == "always"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert service["RuntimeDirectoryMode"] == service["StateDirectoryMode"] == "0700"
    assert service["OOMPolicy"] == "continue"


def test_make_test_runs_every_test_there_is() -> None:
    """The two halves of tests/__main__.py together, and nothing twice."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    run = sorted(path for folder in (*WAITING, *COMPUTING) for path in folder.rglob("test_*.py"))
    assert [path.resolve() for path in run] == [path.resolve() for path in found]
