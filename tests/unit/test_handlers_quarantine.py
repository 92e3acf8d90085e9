# SPDX-License-Identifier: Apache-2.0
"""Who cost a VM its worker, as the next worker knows it: blamed, told, left out, and let in again when its file has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmloop.testing.fake_vm import FakeVm
from vmloop.worker.events import Event
from vmloop.worker.handlers.naming import call_task, label, loading_task, parse_task
from vmloop.worker.handlers.quarantine import FILE_NAME, Quarantine

TASK = "handler mail.on_error on BLOCK_IO_ERROR 17"
PAGE_BYTES = 63  # of a task, what the page keeps


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[FakeVm]:
    loop = asyncio.new_event_loop()
    yield FakeVm(tmp_path, loop=loop)
    loop.close()


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    path = tmp_path / "mail.py"
    path.write_text("first")
    return path


def test_blaming_tells_who_and_how(vm: FakeVm) -> None:
    assert Quarantine(vm).blame(TASK, "killed by signal 11")
    (told,) = vm.emitted("HANDLER_FAILED")
    assert "signal 11" in told.pop("error")
    assert told == {
        "handler": "mail.on_error",
        "event": "BLOCK_IO_ERROR",
        "seq": 17,
        "why": "killed its worker",
        "kind": "handler",
        "quarantined": False,
    }


def test_a_handler_is_left_out_the_second_time_in_every_next_worker(vm: FakeVm, mail: Path) -> None:
    Quarantine(vm).blame(TASK, "exit 3")
    assert not Quarantine(vm).holds("mail.on_error", mail)
    Quarantine(vm).blame(TASK, "exit 3")
    assert [told["quarantined"] for told in vm.emitted("HANDLER_FAILED")] == [False, True]
    for _ in range(2):
        assert Quarantine(vm).holds("mail.on_error", mail)
    assert not Quarantine(vm).holds("mail.on_stop", mail)
    assert not Quarantine(vm).holds("mail.py", mail)


def test_a_file_is_left_out_at_the_first_time_it_was_loaded(vm: FakeVm, mail: Path) -> None:
    Quarantine(vm).blame("loading handlers/mail.py", "exit 3")
    assert vm.emitted("HANDLER_FAILED")[0]["quarantined"]
    assert Quarantine(vm).holds("mail.py", mail)


def test_a_file_that_has_changed_is_let_in_again(vm: FakeVm, mail: Path) -> None:
    Quarantine(vm).blame("loading handlers/mail.py", "exit 3")
    assert Quarantine(vm).holds("mail.py", mail)
    mail.write_text("second, and longer")
    assert not Quarantine(vm).holds("mail.py", mail)
    assert not Quarantine(vm).holds("mail.py", mail)


def test_a_new_run_begins_with_nobody_blamed(vm: FakeVm, mail: Path) -> None:
    Quarantine(vm).blame("loading handlers/mail.py", "exit 3")
    vm.next_run()
    assert not Quarantine(vm).holds("mail.py", mail)


def test_hooks_and_handlers_on_the_thread_are_left_out_and_vmloops_own_never(vm: FakeVm, mail: Path) -> None:
    for task in ("hook 50-mail on STOP 1", "thread mail.spin on STOP 1", "shipped crash.dump on GUEST_PANICKED 1"):
        for _ in range(3):
            assert Quarantine(vm).blame(task, "exit 3")
    quarantine = Quarantine(vm)
    assert quarantine.holds("50-mail", mail)
    assert quarantine.holds("mail.spin", mail)
    assert not quarantine.holds("crash.dump", mail)


@pytest.mark.parametrize(
    "task", ["", "loop", "worker of web1", "handler", "handler ", "loading handlers/", "handlers x"]
)
def test_a_task_that_names_nobody_blames_nobody(vm: FakeVm, task: str) -> None:
    assert not Quarantine(vm).blame(task, "exit 3")
    assert vm.events == []
    assert not (vm.paths.run / FILE_NAME).exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b'{"epoch": "x"}', b'{"epoch": 1, "culprits": {"a": 1}}', b"\xff\xfe", b"[" * 100000],
)
def test_a_torn_or_foreign_file_is_set_aside(vm: FakeVm, mail: Path, content: bytes) -> None:
    (vm.paths.run / FILE_NAME).write_bytes(content)
    quarantine = Quarantine(vm)
    assert not quarantine.holds("mail.py", mail)
    quarantine.blame("loading handlers/mail.py", "exit 3")
    assert Quarantine(vm).holds("mail.py", mail)
    (aside,) = vm.paths.run.glob(f"{FILE_NAME}.damaged-*")
    assert aside.read_bytes() == content


def test_a_directory_that_cannot_be_written_to_costs_nothing_but_the_memory(vm: FakeVm, mail: Path) -> None:
    (vm.paths.run / FILE_NAME).mkdir()
    quarantine = Quarantine(vm)
    quarantine.blame("loading handlers/mail.py", "exit 3")
    assert quarantine.holds("mail.py", mail)


# -- the texts on the page ------------------------------------------------------------------------------------------------

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=130)


@given(names, names, st.integers(1, 10**12))
def test_whatever_the_names_the_page_tells_who_it_was(name: str, event_name: str, seq: int) -> None:
    event = Event(vm=FakeVm.__name__, epoch=1, seq=seq, time=0, event=event_name, data={}, origin="qmp")  # type: ignore[arg-type]
    for kind in ("handler", "shipped", "thread", "hook"):
        kept = call_task(kind, name, event).encode("utf-8", "replace")[:PAGE_BYTES].decode("utf-8", "replace")
        culprit = parse_task(kept)
        assert culprit is not None
        assert (culprit.kind, culprit.label) == (kind, label(name))
    culprit = parse_task(loading_task(name).encode()[:PAGE_BYTES].decode())
    assert culprit is not None
    assert (culprit.kind, culprit.label) == ("loading", label(name))


@given(names, names)
def test_two_names_have_two_labels(one: str, two: str) -> None:
    assert (label(one) == label(two)) == (one == two)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=63))
def test_any_text_on_the_page_is_read(vm: FakeVm, task: str) -> None:
    parse_task(task)
