# SPDX-License-Identifier: Apache-2.0
"""Answers as a client's own door has them: native frames, or Majordomo's. Pure; used by core.py."""

from __future__ import annotations

from ..common.majordomo import Envelope, build_reply
from ..common.wire import Kind, Message, encode
from .actions import ToClient
from .inflight import Entry
from .roster import VmEntry


def own_reply(entry: Entry, vm: VmEntry | None, kind: Kind, body: bytes, now: float) -> ToClient | None:
    """The broker's own answer to a request; None if nobody waits for one. `body` is packed."""
    message = Message(
        kind=kind,
        id=entry.client_id if entry.envelope is None else 0,
        body=body,
        seconds=max(0.0, now - entry.received),
        epoch=vm.epoch if vm is not None else 0,
        seq=vm.seq if vm is not None else 0,
    )
    if entry.envelope is not None:
        return majordomo_reply(entry, entry.envelope, message)
    return ToClient(entry.client, [encode(message)]) if entry.client else None


def majordomo_reply(entry: Entry, envelope: Envelope, message: Message) -> ToClient:
    """A worker's answer, or the broker's own, in a Majordomo client's frames."""
    frames = build_reply(
        envelope,
        ok=message.kind is not Kind.ERROR,
        body=message.body,
        client_id=entry.client_id,
        cursor=f"{message.epoch}.{message.seq}" if entry.vm is not None else None,
        seconds=message.seconds,
        final=message.kind is not Kind.PARTIAL,
    )
    return ToClient(entry.client, frames)
