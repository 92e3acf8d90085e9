# SPDX-License-Identifier: Apache-2.0
"""`events`: what has happened to VMs, and what happens."""

from __future__ import annotations

import time
from collections.abc import Iterable

import click

from ...common.errors import BadRequest
from ..stream import Event
from .base import Invocation, verb, vms_argument
from .output import Output, to_json


@verb("events")
@vms_argument
@click.option("--since", metavar="CURSOR", help="Only what came after EPOCH.SEQ; for one VM.")
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now.")
def events(invocation: Invocation, names: tuple[str, ...], since: str | None, follow: bool) -> None:
    """Recent events of some VMs, or of all.

    With --json each is one object on one line.
    """
    _check_since(names, since)
    output = invocation.output()
    with invocation.host() as host, host.events(*names, since=since, follow=follow, recent=since is None) as stream:
        # Of several VMs the past comes one VM after the other; only where it ends can it be put in order.
        for event in stream if follow else merged(stream):
            _print(output, event)


def merged(events: Iterable[Event]) -> list[Event]:
    """Events of several VMs by their time, those of each VM in their own order: its clock may have been set back meanwhile."""
    latest: dict[str, int] = {}
    placed: list[tuple[int, Event]] = []
    for event in events:
        latest[event.vm] = max(event.time, latest.get(event.vm, 0))
        placed.append((latest[event.vm], event))
    return [event for _, event in sorted(placed, key=lambda pair: pair[0])]


def _check_since(names: tuple[str, ...], since: str | None) -> None:
    from ...common.cursor import parse_cursor

    if since is None:
        return
    if len(names) != 1:
        raise click.UsageError("--since is a cursor of one VM: give its name")
    try:
        parse_cursor(since)
    except BadRequest as error:
        raise click.UsageError(str(error)) from None


def _print(output: Output, event: Event) -> None:
    if output.as_json:
        import msgspec

        fields = msgspec.to_builtins(event)
        if event.journalled:
            del fields["journalled"]  # only said of those that are not
        output.json_line(fields)
        return
    output.event(time_of(event), event.vm, str(event.cursor), event.event, to_json(event.data) if event.data else "")


def time_of(event: Event) -> str:
    """When it happened, in local time."""
    seconds, micro = divmod(event.time, 1_000_000)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{micro:06d}"


COMMANDS = {"events": events}
