# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C in the midst of a call of the blocking client, at any instruction: the host can be closed, and no socket is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmloop.client import calls, connect, lane, session
from vmloop.client.session import Host

from ..fakes.interruption import Interruption
from ..fakes.native_broker import NativeBroker

# A socket whose making was interrupted has nobody yet who could close it, but pyzmq.
half_made = pytest.mark.filterwarnings("ignore:.*[Uu]nclosed socket:ResourceWarning")

FILES = {calls.__file__, lane.__file__, session.__file__}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[NativeBroker]:
    with NativeBroker(tmp_path) as broker:
        broker.answer_with("vmloop", "ping", {"time": 1.0})
        yield broker


def ping(host: Host, instruction: int) -> bool:
    """Whether the call was long enough to be interrupted there."""
    interruption = Interruption(instruction, FILES, "opcode")
    try:
        with interruption:
            host.ping()
    except KeyboardInterrupt:
        assert interruption.struck
    return interruption.struck


@pytest.mark.timeout(60)  # a context that waits for a lost socket would wait for ever
def test_a_call_on_an_open_connection_may_be_interrupted_anywhere(broker: NativeBroker) -> None:
    instruction, interrupted = 1, True
    while interrupted:
        host = connect(broker.endpoint)
        host.ping()
        interrupted = ping(host, instruction)
        host.close()
        assert host._context.closed, f"interrupted at instruction {instruction}"
        instruction += 1
    assert instruction > 300


@pytest.mark.timeout(60)
@half_made
def test_the_first_call_too_which_makes_the_connection(broker: NativeBroker) -> None:
    instruction, interrupted = 1, True
    while interrupted:
        host = connect(broker.endpoint)
        interrupted = ping(host, instruction)
        host.close()
        assert host._context.closed, f"interrupted at instruction {instruction}"
        instruction += 1
    assert instruction > 300


@pytest.mark.timeout(60)
@half_made
def test_a_host_is_closed_while_the_interruption_is_on_its_way(broker: NativeBroker) -> None:
    """Its traceback holds what was being made: a `with` closes the host before that is let go."""
    instruction, interrupted = 1, True
    while interrupted:
        interruption = Interruption(instruction, FILES, "opcode")
        try:
            with connect(broker.endpoint) as host, interruption:
                host.ping()
        except KeyboardInterrupt:
            assert interruption.struck
        interrupted = interruption.struck
        instruction += 1
    assert instruction > 300


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings(
    "ignore:.*Lane.__del__:pytest.PytestUnraisableExceptionWarning"
)  # Python drops what comes there
def test_a_close_may_be_interrupted_anywhere_and_repeated(broker: NativeBroker) -> None:
    instruction, interrupted = 1, True
    while interrupted:
        host = connect(broker.endpoint)
        host.ping()
        interruption = Interruption(instruction, FILES, "opcode")
        try:
            with interruption:
                host.close()
        except KeyboardInterrupt:
            assert interruption.struck
        interrupted = interruption.struck
        host.close()
        assert host._context.closed, f"interrupted at instruction {instruction}"
        instruction += 1
    assert instruction > 50


# -- an interruption that the poll does not see -------------------------------------------------------------------------------

PROMPT = 5.0  # seconds; the call's own deadline is in 30


def interrupt_beside(*_: object) -> tuple[()]:
    """A signal that another thread takes does not end the main thread's poll, as one in the instant before that begins does not."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    return ()


def test_a_call_that_waits_notices_it_all_the_same(broker: NativeBroker) -> None:
    broker.answer("vmloop", "slow", interrupt_beside)
    with connect(broker.endpoint) as host:
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            host.call("vmloop", "slow", timeout=30.0)
        assert time.monotonic() - began < PROMPT
