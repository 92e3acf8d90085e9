# SPDX-License-Identifier: Apache-2.0
"""`import`: a domain of libvirt's becomes a definition."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import click

from ...common.errors import VmloopError
from .base import NAME, Invocation, verb

if TYPE_CHECKING:
    from ..libvirt.importing import Imported
    from ..libvirt.notes import Note
    from .output import Output


_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


@verb("import")
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), metavar="[DOMAIN.xml]", required=False)
@click.option("--output", "-o", metavar="FILE", help="Write the definition to FILE rather than to standard output.")
@click.option("--define", "define_it", is_flag=True, help="Make the VM known to the broker.")
@click.option("--name", type=NAME, metavar="NAME", help="Name of the VM, if not the domain's.")
@click.option("--domain", metavar="NAME", help="Ask libvirt for the XML of this domain of its own.")
@click.option(
    "--connect",
    "uri",
    metavar="URI",
    help="The libvirt to ask, as for virsh: qemu:///system. Without it none needs to run.",
)
def import_domain(
    invocation: Invocation,
    file: str | None,
    output: str | None,
    define_it: bool,
    name: str | None,
    domain: str | None,
    uri: str | None,
) -> None:
    """Make a definition of a libvirt domain.

    DOMAIN.xml is what `virsh dumpxml --inactive` prints; - reads standard input. libvirt must be installed, but need not run. What the
    definition does not have is listed on standard error, and at the head of the file.
    """
    if (file is None) == (domain is None):
        raise click.UsageError("give DOMAIN.xml or --domain, one of the two")
    out = invocation.output()
    with _ending_in_order(), out.busy("libvirt translates the domain"):
        imported, origin = _from_file(file, name, uri) if file is not None else _from_libvirt(str(domain), name, uri)
    from ..libvirt.document import document

    text = document(imported, origin)
    if not out.as_json:
        _tell(out, imported)  # first: they tell why it cannot be written or defined
    try:
        if output is not None:
            _write(output, text)
        if define_it:
            _define(invocation, imported)
    except VmloopError:
        if out.as_json:  # what would have held them is not printed
            _tell(out, imported)
        raise
    vm = imported.definition.name
    done = [f"{vm}: written to {output}"] * (output is not None) + [f"{vm}: defined"] * define_it
    out.result(_as_json(imported, text), lambda: _say(done, text))


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM and a closed terminal end the command as Ctrl-C does: virsh, in a session of its own, and its directory would stay behind."""

    def end(number: int, _: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # the end is on its way, and has deadlines
        raise SystemExit(128 + number)

    caught = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]  # nohup: it stays ignored
    before = {number: signal.signal(number, end) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _from_file(file: str, name: str | None, uri: str | None) -> tuple[Imported, str]:
    from ..libvirt.importing import import_domain as import_xml
    from ..libvirt.virsh import translate

    origin = "standard input" if file == "-" else file
    return import_xml(_read(file), origin, lambda xml: translate(xml, uri, origin), name=name), origin


def _from_libvirt(domain: str, name: str | None, uri: str | None) -> tuple[Imported, str]:
    import msgspec

    from ..libvirt.importing import import_domain as import_xml
    from ..libvirt.virsh import known_domain, translate

    origin = f"domain {domain}"
    known = known_domain(domain, uri)
    imported = import_xml(
        known.xml, origin, lambda xml: translate(xml, uri, origin), name=name, autostart=known.autostart is True
    )
    return msgspec.structs.replace(imported, notes=[*imported.notes, *_warnings(known.running, known.saved)]), origin


def _warnings(running: bool | None, saved: bool | None) -> list[Note]:
    from ..libvirt.notes import left_out, warning

    notes = []
    if running:
        notes.append(
            warning(
                "the domain runs",
                "two QEMUs on one disk destroy it: shut it down, and undefine it, before vmloop starts it",
            )
        )
    if saved:
        notes.append(left_out("managed save", "the guest will boot; virsh start goes on from where it was saved"))
    return notes


def _read(file: str) -> bytes:
    from ...common.errors import ConfigError
    from ..libvirt.domain_xml import MAX_XML_BYTES

    if file == "-":
        return sys.stdin.buffer.read(MAX_XML_BYTES + 1)
    try:
        with open(file, "rb") as stream:
            return stream.read(MAX_XML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error


def _write(output: str, text: bytes) -> None:
    from ...common.durable import write_whole
    from ...common.errors import ConfigError

    target = Path(output)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(text)  # a device or a pipe is written to: a file must not take its place
        else:
            write_whole(Path(os.path.realpath(target)), text)  # a link stays one
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error.strerror}") from error


def _define(invocation: Invocation, imported: Imported) -> None:
    import msgspec

    with invocation.host() as host:
        host.call("vmloop", "define", {"definition": msgspec.to_builtins(imported.definition)})


def _tell(out: Output, imported: Imported) -> None:
    for note in imported.notes:
        out.aside(f"{note.kind.words}: {note.what}: {note.why}")


def _as_json(imported: Imported, text: bytes) -> dict[str, Any]:
    import msgspec

    from ..libvirt.notes import Kind

    lists = {
        kind.value: [{"what": note.what, "why": note.why} for note in imported.notes if note.kind is kind]
        for kind in Kind
    }
    return {"definition": msgspec.to_builtins(imported.definition), "toml": text.decode(), **lists}


def _say(done: list[str], text: bytes) -> None:
    """What was done; with nothing to do, the definition itself."""
    if done:
        click.echo("\n".join(done))
    else:
        click.echo(text, nl=False)


COMMANDS = {"import": import_domain}
