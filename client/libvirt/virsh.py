# SPDX-License-Identifier: Apache-2.0
"""Asking libvirt, through its own command: QEMU's arguments for a domain's XML, and the XML of a domain that it knows. Used by client/cli.

Without a URI libvirt's QEMU driver runs inside virsh itself, in a directory that is made for it and removed: no daemon is needed, none
hears of it, and of the host's own libvirt nothing is read or changed. Run by root it runs as nobody: the XML may come from anywhere, and
names the emulator that libvirt starts to learn what it can do.
"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from ...common.errors import ConfigError
from .contained import Finished, Identity, run

# Most of it is the emulator, which is started to tell what it can do: 2 s here, with a slow disk 10.
TRANSLATE_SECONDS: Final = 60.0
# A question to a daemon; one that hangs with a VM of its own answers this all the same.
ASK_SECONDS: Final = 30.0

_DOMAIN: Final = "domain.xml"

INSTALL: Final = (
    "on Debian and Ubuntu: apt-get install --no-install-recommends libvirt-clients libvirt-daemon-driver-qemu; "
    "on Fedora: dnf install libvirt-client libvirt-daemon-driver-qemu. No daemon needs to run"
)

# What libvirt says → what to do about it.
_ADVICE: Final = (
    ("no connection driver available", f"its QEMU driver is not installed; {INSTALL}"),
    (
        "does not support virt type 'kvm'",
        "KVM cannot be used here (/dev/kvm): import on the host that has it, or set type='qemu' in the XML, "
        "and mode='maximum' where its <cpu> says host-passthrough",
    ),
    ("CPU mode 'host-passthrough'", "only KVM passes the host's CPU on: set mode='maximum' in <cpu>, or type='kvm'"),
    ("No emulator found for arch", "install it (on Debian: qemu-system-arm, -ppc, -misc …), or name it in <emulator>"),
    ("find any firmware", "install it (on Debian: ovmf, qemu-efi-aarch64), or name it in <loader> instead"),
    ("/sys/bus/", "the domain has a device of another host: import it there, or take that device out of the XML"),
    (
        "/dev/dri",
        "the domain draws with the host's graphics card: import where there is one, or take <gl> and accel3d out",
    ),
    (
        "virtsecretd",
        "the domain's secrets are known to a running libvirt only: name it with --connect qemu:///system, "
        "or take <auth> and <encryption> out of the XML and add them to the definition",
    ),
    ("virtstoraged", "storage pools are known to a running libvirt only: name it with --connect qemu:///system"),
    ("virtnetworkd", "virtual networks are known to a running libvirt only: name it with --connect qemu:///system"),
    (
        "hugetlbfs",
        "several kinds of pages are known to a system's libvirt only: name it with --connect qemu:///system, or take <hugepages> out",
    ),
    ("session mode", "an ordinary user's libvirt refuses it: name the system's with --connect qemu:///system"),
    ("Cannot check QEMU binary", "install the emulator, or correct <emulator>"),
    ("Failed to connect socket", "no libvirt daemon listens there"),
)


class Translated(msgspec.Struct, frozen=True):
    """libvirt's answer. `own_directory`: what it was given for this alone, and is gone; empty where a daemon answered."""

    command_line: str
    own_directory: str


class Known(msgspec.Struct, frozen=True):
    """A domain that a libvirt knows. `running`, `autostart`, `saved`: None where it did not say."""

    xml: bytes
    running: bool | None
    autostart: bool | None
    saved: bool | None


def translate(xml: bytes, uri: str | None, origin: str) -> Translated:
    """QEMU's command line for a domain. `ConfigError` without libvirt, or if it refuses; `DeadlineExceeded`."""
    virsh = _virsh()
    identity = _nobody() if uri is None else None
    with _directory(identity, xml) as directory:
        file = directory / _DOMAIN
        connection = uri if uri is not None else f"qemu:///embed?root={directory}"
        argv = [virsh, "--quiet", "--connect", connection, "domxml-to-native", "qemu-argv", str(file)]
        environment = _environment(None if uri is not None else directory)
        done = _run(argv, TRANSLATE_SECONDS, environment=environment, identity=identity, mark=str(directory))
        return Translated(_answer(done, origin), str(directory) if uri is None else "")


def known_domain(name: str, uri: str | None) -> Known:
    """A domain by its name. `ConfigError` without libvirt, or if it does not know it; `DeadlineExceeded`."""
    virsh = [_virsh(), "--quiet", *(("--connect", uri) if uri is not None else ())]

    def ask(*words: str) -> str:
        done = _run([*virsh, *words, "--domain", name], ASK_SECONDS, environment=_environment(None))
        return _answer(done, f"domain {name}")

    xml = ask("dumpxml", "--inactive")
    facts = dict(line.partition(":")[::2] for line in ask("dominfo").splitlines())
    said = {key.strip(): value.strip() for key, value in facts.items()}
    return Known(
        xml.encode(),
        None if "State" not in said else said["State"] != "shut off",
        None if "Autostart" not in said else said["Autostart"] == "enable",
        None if "Managed save" not in said else said["Managed save"] == "yes",
    )


# -- how ------------------------------------------------------------------------------------------------------------------


def _virsh() -> str:
    found = shutil.which("virsh")
    if found is None:
        raise ConfigError(f"libvirt is not installed (no virsh in PATH), and it translates the XML; {INSTALL}")
    return found


def _run(
    argv: list[str], seconds: float, *, environment: dict[str, str], identity: Identity | None = None, mark: str = ""
) -> Finished:
    try:
        return run(argv, seconds, environment=environment, identity=identity, mark=mark)
    except OSError as error:  # a script without its interpreter, a directory that nobody may look into
        raise ConfigError(f"cannot run {argv[0]}: {error.strerror}") from error


def _answer(done: Finished, origin: str) -> str:
    if done.status != 0:
        raise ConfigError(f"{origin}: libvirt refuses it: {_complaint(done)}")
    try:
        return done.stdout.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: libvirt's answer is no UTF-8: a definition cannot hold such a path") from error


def _complaint(done: Finished) -> str:
    """What virsh printed as its error, and what to do."""
    lines = done.stderr.decode(errors="replace").splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    text = "; ".join(errors)[:1000] or f"virsh ended with {done.status}"
    advice = next((what for sign, what in _ADVICE if sign in text), "")
    return f"{text} ({advice})" if advice else text


def _environment(directory: Path | None) -> dict[str, str]:
    """C: its messages are compared. Without a directory of its own it finds the daemons as the user would."""
    if directory is None:
        return {**os.environ, "LC_ALL": "C.UTF-8"}
    return {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(directory), "LC_ALL": "C.UTF-8"}


def _nobody() -> Identity | None:
    """Whom libvirt runs as for root: nobody, with the group of /dev/kvm, without which it takes KVM for not there."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError as error:
        raise ConfigError(
            "there is no user nobody to run libvirt as; import as an ordinary user, or name a daemon with --connect"
        ) from error
    kvm = Path("/dev/kvm")
    return Identity(entry.pw_uid, entry.pw_gid, [kvm.stat().st_gid] if kvm.exists() else [])


@contextmanager
def _directory(identity: Identity | None, xml: bytes) -> Iterator[Path]:
    """With the domain in it. It is handed over afterwards: in a directory of another's root would write wherever a link there leads."""
    with tempfile.TemporaryDirectory(prefix="vmloop-import-") as name:
        directory = Path(name)
        (directory / _DOMAIN).write_bytes(xml)
        (directory / _DOMAIN).chmod(0o644)
        if identity is not None:
            os.chown(directory, identity.user, identity.group)
        yield directory
