# SPDX-License-Identifier: Apache-2.0
"""libvirt's answers as recorded in tests/data/libvirt, in the place of libvirt; run as a program it records them anew."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmloop.client.libvirt.domain_xml import read_domain
from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.preparation import prepare
from vmloop.client.libvirt.virsh import Translated, translate

DATA: Final = Path(__file__).parents[1] / "data" / "libvirt"
RECORDED: Final = ("desk", "cards", "firmware")
OWN_DIRECTORY: Final = "/tmp/vmloop-import-recorded"
BARE: Final = b"<domain type='qemu'><name>old</name></domain>"


def domain(name: str) -> bytes:
    return (DATA / f"{name}.xml").read_bytes()


def answer(name: str) -> Translated:
    return Translated((DATA / f"{name}.argv").read_text(), OWN_DIRECTORY)


def imported(name: str, *, there: tuple[str, ...] = ()) -> Imported:
    """A recorded domain, imported; of all files only those are there."""
    xml = domain(name) if name in RECORDED else BARE
    return import_domain(xml, f"{name}.xml", lambda _: answer(name), exists=lambda path: path in there)


def record() -> None:
    for name in RECORDED:
        prepared = prepare(read_domain(domain(name), name), name)
        found = translate(prepared.xml, None, name)
        (DATA / f"{name}.argv").write_text(
            found.command_line.replace(found.own_directory, OWN_DIRECTORY).strip() + "\n"
        )


if __name__ == "__main__":
    record()
