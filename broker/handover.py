# SPDX-License-Identifier: Apache-2.0
"""From one zygote to the next: what the old one keeps goes to a new one, which takes its place at run/zygote.sock when it has all.

    heir started at run/zygote.new ─► Tell ─► old: Kept … Told ─► heir: Keep … Hello ─► heir answers: it has everything
    ─► renamed onto run/zygote.sock ─► old: Retire

Whoever is killed in between: until the rename the old one is in its place and keeps everything; from then on the heir is and does. A zygote
that finds another one in its place lets go by itself. Driven by spawner.py; never waits.
"""

from __future__ import annotations

import logging
import subprocess

from ..common.zygote_wire import Drop, Dropped, Hello, Keep, Kept, Packet, Tell, Told
from .packets import PacketEnd

log = logging.getLogger(__name__)


class Handover:
    """One under way. `old` None: it is gone, or speaks no such packets, and there is nothing to be had from it."""

    def __init__(
        self, old: PacketEnd | None, heir: PacketEnd, child: subprocess.Popen[bytes], version: str, due: float
    ):
        self.heir = heir
        self.child = child
        self.due = due
        self.told = old is None
        self._version = version
        self._asked = False
        self._old = old

    def begin(self) -> None:
        """Ask the old one, or the heir at once. Raises OSError if the heir is gone; that the old one is, is read from its connection."""
        if self._old is not None:
            try:
                self._old.send(Tell())
            except OSError as error:
                log.info("the old zygote is gone: %s", error)
        self._ask_if_told()

    def from_old(self, packet: Packet, fds: list[int]) -> None:
        """What the old zygote tells. Takes the fds that it uses out of `fds`. Raises OSError if the heir cannot get it."""
        if isinstance(packet, Kept) and not fds:
            raise OSError(f"VM {packet.vm}: no fd was free to pass its {packet.slot} on")
        pass_on(packet, fds, self.heir)
        if isinstance(packet, Told):
            self.told = True
            self._ask_if_told()

    def old_is_gone(self) -> None:
        """There is no more to be had than what was told; the workers have the rest. Raises OSError if the heir is gone."""
        self.told = True
        self._ask_if_told()

    def from_heir(self, packet: Packet) -> bool:
        """Whether the heir has everything. Packets arrive in their order: who answers the greeting has all that was sent before it."""
        return isinstance(packet, Hello) and self._asked

    def _ask_if_told(self) -> None:
        if self.told and not self._asked:
            self._asked = True
            self.heir.send(Hello(self._version))


def pass_on(packet: Packet, fds: list[int], to: PacketEnd) -> None:
    """What a zygote tells of what it keeps, as news for another one. Takes the fds that it uses out of `fds`. Raises OSError."""
    if isinstance(packet, Kept) and len(fds) == 1:
        to.send(Keep(packet.vm, packet.slot), fds.pop())
    elif isinstance(packet, Kept):
        log.error("VM %s: no fd was free to pass its %s on; it would not outlive its worker", packet.vm, packet.slot)
    elif isinstance(packet, Dropped):
        to.send(Drop(packet.vm, packet.slot))
