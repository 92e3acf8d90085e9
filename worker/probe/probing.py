# SPDX-License-Identifier: Apache-2.0
"""One probe of one binary: a throw-away QEMU is started and asked, under KVM also a second one without it. Used by asking.py."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path
from typing import Any, Final

from ...common.capabilities import Capabilities
from ...common.definition import SIMULATED
from ...common.errors import BadRequest, DeadlineExceeded, LaunchFailed, MonitorLost
from .conversation import MAX_LINE_BYTES, Conversation
from .document import document
from .questions import PROBE, PROBE_TCG, Question, Reply, kvm_enabled
from .throwaway import Throwaway

# All of a probe. It takes well under a second; below a request's 30 s, so that who asks hears why it failed.
PROBE_SECONDS: Final = 20.0
# Its machines. QEMU takes the first accelerator that works: qtest, which needs nothing and runs nothing, lets a binary without TCG
# (Debian's qemu-system-x86_64-microvm) be asked where there is no KVM.
ANY: Final = "none,accel=kvm:tcg:qtest"
TCG: Final = "none,accel=tcg"
LAST_WORDS: Final = 0.5  # a QEMU that hangs up has so long to end by itself: then its own end is what to tell


def find_binary(name: str) -> str:
    """The canonical path of a binary given by path or by name. Raises `LaunchFailed` naming what is wrong; `BadRequest` for "simulated"."""
    if name == SIMULATED:
        raise BadRequest("the simulated QEMU has no binary that could be probed")
    if "\0" in name or not name:
        raise BadRequest(f"{name!r:.100} is no path of a binary")
    if "/" in name and not name.startswith("/"):
        raise BadRequest(f"the path {name!r:.300} must be absolute")
    try:
        found = shutil.which(name)
        if found is not None:
            return os.path.realpath(found)
        what = "is a directory" if Path(name).is_dir() else "is not executable" if Path(name).exists() else ""
    except OSError as error:
        raise LaunchFailed(f"{name:.300}: {error.strerror}", log="") from error
    if "/" in name and what:
        raise LaunchFailed(f"{name} {what}; name the file of a QEMU", log="")
    raise LaunchFailed(f"there is no executable {name!r:.300}; install QEMU or name another binary", log="")


async def probe(binary: str, seconds: float = PROBE_SECONDS) -> Capabilities:
    """Start and ask; the document. `binary`: a canonical path; `seconds`: for all of it.

    Raises `LaunchFailed` (it cannot be started, is no QEMU, or died before it had answered; field `log` is the end of what it printed) or
    `DeadlineExceeded` (it hangs). Nothing is left running.
    """
    try:
        async with asyncio.timeout(seconds):
            replies = await _dialogue(binary, ANY, PROBE)
            tcg = await _dialogue(binary, TCG, PROBE_TCG) if _may_differ(replies) else None
    except TimeoutError:
        raise DeadlineExceeded(f"{binary}: the probe was not done within {seconds:g} s, and was ended") from None
    return document(binary, replies, tcg)


def _may_differ(replies: dict[str, Reply]) -> bool:
    """Whether the first run used KVM, of a binary that has TCG too."""
    accelerators = replies.get("qom-list-types/accel")
    names = str(accelerators.value) if accelerators is not None else ""
    return kvm_enabled(replies) and ("tcg" in names or not names)


async def _dialogue(binary: str, machine: str, table: tuple[Question, ...]) -> dict[str, Reply]:
    async with Throwaway(binary, machine) as qemu:
        talk = asyncio.ensure_future(_talk(qemu, table))
        try:
            either: set[asyncio.Future[Any]] = {talk, qemu.ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done():
                await asyncio.wait({talk}, timeout=LAST_WORDS)  # what it said before its end is still in the socket
            if not talk.done():
                raise MonitorLost("it ended before it had answered")
            return await talk
        except MonitorLost as error:
            how = await qemu.how_it_ended(LAST_WORDS)
            said = qemu.output.splitlines()[-1] if qemu.output else "nothing was printed"
            text = f"{binary} could not be probed: {error}; {how}: {said:.300}. Is it a QEMU of 4.2 or later?"
            raise LaunchFailed(text, log=qemu.output) from error
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"{binary} could not be probed: {error}; it was ended") from error
        finally:
            talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)


async def _talk(qemu: Throwaway, table: tuple[Question, ...]) -> dict[str, Reply]:
    reader, writer = await asyncio.open_unix_connection(sock=qemu.monitor, limit=MAX_LINE_BYTES)
    try:
        conversation = Conversation(reader, writer)
        await conversation.open()
        return await conversation.ask_all(table)
    finally:
        writer.close()
