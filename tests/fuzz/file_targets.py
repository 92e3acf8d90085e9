# SPDX-License-Identifier: Apache-2.0
"""Targets for files: settings, definitions, run.json, what handlers leave for the next worker, the status page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from vmloop.broker import catalogue
from vmloop.common.config import parse_toml
from vmloop.common.definition import Definition, QemuSection, definition_from_toml, definition_to_toml
from vmloop.common.errors import ConfigError
from vmloop.common.names import VmName
from vmloop.common.page import LEDGER_AT, LEDGER_SLOT_WORDS, MAGIC, PAGE_BYTES, Page, PageDamaged, Word
from vmloop.common.paths import Paths
from vmloop.common.process import Identity
from vmloop.common.settings import Settings
from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.agent.ledger import AgentLedger, AgentOwed, Part
from vmloop.worker.events import Event, EventLog
from vmloop.worker.handlers import pending, quarantine
from vmloop.worker.handlers.naming import parse_task
from vmloop.worker.handlers.pending import MAX_PENDING, Pending
from vmloop.worker.handlers.quarantine import Quarantine
from vmloop.worker.journal.store import EventStore
from vmloop.worker.qmp.ledger import Ledger, Owed
from vmloop.worker.runfile import Run, RunEnd, read_run, write_run

from .values import HOSTILE_JSON

NAME: Final = VmName("web1")
EPOCH: Final = 3


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory in memory where there is one: thousands are made a minute."""
    with tempfile.TemporaryDirectory(prefix="vmloop-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as d:
        yield Path(d)


# -- TOML ---------------------------------------------------------------------------------------------------------------------


def definition(data: bytes) -> None:
    """TOML text is refused as `ConfigError`, or is a definition that is written as text that reads back as the same."""
    try:
        found = definition_from_toml(data, "here")
    except ConfigError as error:
        assert str(error).startswith("here")
        return
    assert definition_from_toml(definition_to_toml(found), "again") == found


def definitions() -> list[bytes]:
    odd = Definition("a", QemuSection("simulated", ["-name", '"\x7f\t\\\u2028é\n', "'''", "-m", "512"]))
    sample = Path(__file__).parents[2] / "deploy" / "vm.toml"
    return [
        definition_to_toml(odd),
        definition_to_toml(Definition("web1")),
        *([sample.read_bytes()] if sample.exists() else []),
        b'name = "a"\n[handlers]\nload = ["mail"]\non_crash = "dump"\n[agent]\ntimeout = 5\nenabled = true',
        b'name = "a"\n[qemu]\nargs = ["-qmp", "stdio"]',
        b"name = 9" + b"9" * 5000,
        b"a." * 16_000 + b"a = 1",
        b"[" + b"a." * 16_000 + b"a]",
        b"a = {" + b'"a" . ' * 16_000 + b"a = 1}",
        b"a = " + b"[" * 5000,
        b"name = 2026-02-30\nx = 25:61:61",
        b"name = nan\n[agent]\ntimeout = nan",
        b'name = "\\uD800"',
        b"name = '''\r\n\xff'''",
        b'nam = "a"',
    ]


def settings(data: bytes) -> None:
    """TOML text is refused as `ConfigError`, or is settings that can be handed to a worker and come out as they were."""
    try:
        found = parse_toml(data, Settings, "here")
    except ConfigError:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Settings) == found


def settings_texts() -> list[bytes]:
    sample = Path(__file__).parents[2] / "deploy" / "vmloop.toml"
    return [
        *([sample.read_bytes()] if sample.exists() else []),
        b"[broker]\ndrain = 1\nrequests_per_vm = 4\n[worker]\nmax_reply = 65536\n[log]\nlevel = 'debug'\n",
        b"[broker]\ndrain = inf",
        b"[worker]\nmemory_limit = 99999999999999999999999999999",
        b"[log]\nlevel = 'debug\n'",
        b"[worker.x]\ny = 1",
        *definitions()[-10:],
    ]


# -- run.json, as its worker and a starting broker read it ----------------------------------------------------------------------


def run_file(data: bytes) -> None:
    """Damaged is set aside by a worker and left alone by a broker; whatever else is there is written as it was read."""
    with directory() as root:
        paths = Paths(root / "run", root / "state", root / "etc")
        vm = paths.vm(NAME)
        vm.state.mkdir(parents=True)
        vm.run.mkdir(parents=True)
        vm.run_file.write_bytes(data)
        [found] = catalogue.scan(paths)
        assert 0 <= found.newest.epoch < 1 << 32
        assert vm.run_file.read_bytes() == data
        run = read_run(vm.run_file)
        assert vm.run_file.exists() == (run is not None)
        if run is not None and -(1 << 63) <= run.epoch < 1 << 63:
            write_run(vm.run_file, run)
            assert msgspec.json.encode(read_run(vm.run_file)) == msgspec.json.encode(run)


def run_files() -> list[bytes]:
    alive = Run(EPOCH, "boot", 1.5, Identity(7, 9, "/bin/qemu"), "/run/monitor.sock", argv=["qemu", "-m", "512"])
    runs = [
        alive,
        msgspec.structs.replace(alive, ended=RunEnd("shutoff", "shutdown", 2.5), definition={"name": "web1"}),
    ]
    not_text = msgspec.json.encode(msgspec.structs.replace(alive, ended=RunEnd("????", "", 0.0)))
    return [
        *map(msgspec.json.encode, runs),
        not_text.replace(b"????", b"\xff\xfe\xed\xa0"),
        b'{"epoch":1,"argv":["\xff"]}',
        b'{"epoch":18446744073709551616}',
        b'{"epoch":-1}',
        *(b'{"epoch":1,"definition":{"a":' + value + b"}}" for value in HOSTILE_JSON),
        *HOSTILE_JSON,
    ]


# -- what handlers leave for the next worker ------------------------------------------------------------------------------------


def pending_file(data: bytes) -> None:
    """Whatever is there: only events of this run that are handled again, and a file that can be written again."""
    with directory() as root:
        (root / pending.FILE_NAME).write_bytes(data)
        found = Pending(root, EPOCH)
        assert all(event.epoch == EPOCH and event.event in pending.EVENTS for event in found.events)
        for event in found.events[: 2 * MAX_PENDING]:
            found.done(event)
        found.add(Event(NAME, EPOCH, 1, 0, "SHUTDOWN", {}, "qmp"))


def pending_files() -> list[bytes]:
    event = Event(NAME, EPOCH, 1, 1, "SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, "qmp")
    some = msgspec.json.encode([event, msgspec.structs.replace(event, event="GUEST_PANICKED", seq=2)])
    return [
        some,
        some.replace(b"true", b"1" + b"0" * 30),
        some.replace(b"true", b'"\xff"'),
        *(some.replace(b"true", value) for value in HOSTILE_JSON),
        *HOSTILE_JSON,
    ]


def quarantine_file(data: bytes) -> None:
    """Whatever is there: handlers are held or not, and the next blame is written down."""
    loop = asyncio.new_event_loop()
    try:
        with directory() as root:
            vm = FakeVm(root, loop=loop)
            (vm.paths.run / quarantine.FILE_NAME).write_bytes(data)
            Quarantine(vm).holds("mail.on_error", root / "mail.py")
            assert Quarantine(vm).blame("handler mail.on_error on STOP 17", "it was killed")
            assert Quarantine(vm).holds("mail.on_error", root / "mail.py") in (False, True)
    finally:
        loop.close()


def quarantine_files() -> list[bytes]:
    entry = b'{"kills":2,"loading":false,"file":[1,2]}'
    kept = b'{"epoch":1,"culprits":{"mail.on_error":' + entry + b"}}"
    return [
        kept,
        kept.replace(b"mail", b"\xff"),
        kept.replace(b"2,", b"99999999999999999999,"),
        kept.replace(b"[1,2]", b"[1,99999999999999999999]"),
        kept.replace(b"2,", b"9223372036854775807,"),
        kept.replace(b"2,", b"18446744073709551615,"),
        *HOSTILE_JSON,
    ]


# -- the status page ------------------------------------------------------------------------------------------------------------


def page(data: bytes) -> None:
    """Any page is `PageDamaged` or can be read, and then the next worker's ledger and events go on from it."""
    with directory() as root:
        path = root / "page"
        path.write_bytes(data)
        with contextlib.suppress(PageDamaged), Page(path, writable=bool(data)) as found:
            _read_page(found)
        whole = MAGIC.to_bytes(8, "little") + data[: PAGE_BYTES - 8].ljust(PAGE_BYTES - 8, b"\0")
        path.write_bytes(whole)
        with contextlib.suppress(PageDamaged), Page(path, writable=True) as found:
            _read_page(found)
            _go_on_from(found)


def _read_page(found: Page) -> None:
    assert found.blocked_seconds() >= 0.0
    for text in (found.task(), found.state_reason()):
        assert len(text.encode("utf-8", "surrogatepass")) <= 3 * 64
        parse_task(text)


def _go_on_from(found: Page) -> None:
    ledger = Ledger(found)
    try:
        for owed in ledger:
            assert len(owed.key) <= 64
        ledger.clear()
        assert list(ledger) == []
        mine = Owed(ledger.next_qmp_id(), 5, True, False, 1.0, b"key")
        frames: list[bytes] = []
        store = EventStore(Path(os.devnull))  # a disk that takes nothing
        EventLog(NAME, found, frames.append, store).emit("STOP", {})
        assert frames
        with contextlib.suppress(LookupError):
            ledger.strike(mine.qmp_id)
        agent = AgentLedger(found)
        assert all(len(entry.key) <= 64 for entry in agent)
        for number in range(1, 20):
            agent.enter(AgentOwed(Part.ENDING, number))
    finally:
        ledger.release()


def pages() -> list[bytes]:
    """With the magic, which `page` puts there, left out."""
    figures = [0] * (PAGE_BYTES // 8)
    figures[Word.EPOCH], figures[Word.QMP_ID], figures[Word.PROGRESS] = EPOCH, 41, 17 << 24 | 100
    for slot in range(3):
        at = LEDGER_AT + slot * LEDGER_SLOT_WORDS
        figures[at : at + 6] = [1 | slot << 1, 40 + slot, 7, 0x7FF8 << 48, 3, int.from_bytes(b"key", "little")]
    usual = b"".join(figure.to_bytes(8, "little") for figure in figures)
    task = b"handler mail.on_error on STOP 17".ljust(64, b"\0")
    return [
        b"",
        usual,
        usual[8:],
        usual[8:128] + task + usual[192:],
        b"\xff" * (PAGE_BYTES - 8),
        b"\x01" * (PAGE_BYTES - 8),
    ]
