# SPDX-License-Identifier: Apache-2.0
"""Targets for the import from libvirt: a domain's XML from anywhere, and the command line that libvirt prints for it."""

from __future__ import annotations

from vmloop.client.libvirt.document import document
from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.virsh import Translated
from vmloop.common.definition import definition_from_toml
from vmloop.common.errors import ConfigError

from ..fakes import recorded_libvirt

_CARDS = recorded_libvirt.answer("cards")  # with placeholders for as many cards as a domain may come to have


def domain_xml(data: bytes) -> None:
    """XML is refused as `ConfigError` that names it, or becomes a definition whose file reads back as the same."""
    try:
        found = import_domain(data, "here", lambda _: _CARDS, exists=lambda _: False)
    except ConfigError as error:
        assert str(error).startswith("here")
        return
    _reads_back(found)


def domains() -> list[bytes]:
    return [
        recorded_libvirt.BARE,
        b"<!DOCTYPE domain [<!ENTITY a 'b'>]><domain type='kvm'><name>&a;</name></domain>",
        b"<domain type='kvm'><name>a</name><memory unit='\xc2\xb2'>1</memory><currentMemory>\xc2\xb2</currentMemory></domain>",
        b"<domain type='kvm'><name>a</name><devices>"
        b"<interface type='user'><boot order='\xd9\xa1'/><rom bar='on'/></interface></devices></domain>",
        *(recorded_libvirt.domain(name) for name in recorded_libvirt.RECORDED),
    ]


def libvirt_answer(data: bytes) -> None:
    """What libvirt prints is refused as `ConfigError`, or becomes a definition whose file reads back as the same."""
    xml = recorded_libvirt.domain("cards")
    line = Translated(data.decode(errors="replace"), recorded_libvirt.OWN_DIRECTORY)
    try:
        found = import_domain(xml, "here", lambda _: line, exists=lambda _: False)
    except ConfigError:
        return
    _reads_back(found)


def libvirt_answers() -> list[bytes]:
    odd = (
        b"q -device {} -device '{\"driver\":{}}' -chardev ,,,=, -mon '' -object secret -netdev fd=1",
        b'q -device \'{"id":"ua-vmloop-net0","driver":7}\' -rtc',
        b"q '-append' -append -name \xff -drive file=/var/lib/libvirt/qemu/x_VARS.fd -sandbox spawn",
    )
    return [
        *odd,
        *(recorded_libvirt.answer(name).command_line.encode() for name in (*recorded_libvirt.RECORDED, "old")),
    ]


def _reads_back(found: Imported) -> None:
    assert definition_from_toml(document(found, "here"), "again") == found.definition
    assert [word for option in found.options for word in option.words()] == found.definition.qemu.args
