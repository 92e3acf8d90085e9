# SPDX-License-Identifier: Apache-2.0
"""A domain's XML from anywhere: what is no domain of QEMU's is refused by name, and nothing in it is expanded, fetched or believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.client.libvirt.domain_xml import MAX_DEPTH, MAX_ELEMENTS, MAX_XML_BYTES, domain_bytes, read_domain
from vmloop.client.libvirt.inventory import notes_of_domain
from vmloop.client.libvirt.preparation import prepare
from vmloop.common.errors import ConfigError

from ..fakes.recorded_libvirt import RECORDED, domain

BOMB = b"""<!DOCTYPE domain [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<domain type='kvm'><name>&b;</name></domain>"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (BOMB, "document type"),
        (b"<!DOCTYPE domain SYSTEM 'file:///etc/passwd'><domain type='kvm'><name>a</name></domain>", "document type"),
        (b"<domain type='kvm'><name>&a;</name></domain>", "not XML"),
        (b"<domain type='kvm'><name>a</name>", "not XML"),
        (b"", "not XML"),
        (b"\xff\xfe\x00", "not XML"),
        (b"<?xml version='1.0' encoding='nonsense'?><domain/>", "encoding"),
        (b"<network><name>default</name></network>", "<network>, not a <domain>"),
        (b"<domain type='xen'><name>a</name></domain>", "'xen'"),
        (b"<domain type='lxc'><name>a</name></domain>", "'lxc'"),
        (b"<domain><name>a</name></domain>", "not run by QEMU"),
        (b"<domain type='kvm'/>", "no <name>"),
        (b"<domain type='kvm'>" + b"<a>" * MAX_DEPTH, "levels"),
        (b"<domain type='kvm'>" + b"<a/>" * MAX_ELEMENTS, "elements"),
        (b" " * (MAX_XML_BYTES + 1), "bytes"),
    ],
)
def test_what_is_no_domain_of_qemus_is_refused_with_its_origin(text: bytes, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as refused:
        read_domain(text, "some.xml")
    assert str(refused.value).startswith("some.xml: ")


@pytest.mark.parametrize("name", RECORDED)
def test_a_domain_is_written_as_it_was_read(name: str) -> None:
    root = read_domain(domain(name), name)
    again = read_domain(domain_bytes(root), name)
    assert [(each.tag, each.attrib) for each in again.iter()] == [(each.tag, each.attrib) for each in root.iter()]


def test_many_elements_side_by_side_are_not_deep() -> None:
    text = b"<domain type='kvm'><name>a</name>" + b"<a><b/></a>" * MAX_DEPTH + b"</domain>"
    assert len(read_domain(text, "here")) == MAX_DEPTH + 1


@given(st.text())
def test_text_in_a_domain_never_becomes_markup(text: str) -> None:
    root = read_domain(b"<domain type='kvm'><name>a</name></domain>", "here")
    prepared = prepare(root, text)
    try:
        again = read_domain(prepared.xml, "again")
    except ConfigError:
        return  # letters that XML has not at all: libvirt refuses it as we do
    assert [each.tag for each in again.iter()] == ["domain", "name"]


@pytest.mark.parametrize("name", RECORDED)
def test_libvirt_is_given_nothing_that_it_would_do_on_the_host(name: str) -> None:
    prepared = prepare(read_domain(domain(name), name), name)
    tags = {each.tag for each in read_domain(prepared.xml, name).iter()}
    assert tags.isdisjoint({"interface", "cputune", "memtune", "seclabel", "metadata", "tpm", "on_lockfailure"})


def test_an_element_that_vmloop_does_not_know_is_listed() -> None:
    text = b"<domain type='kvm'><name>a</name><novelty/><devices><gadget/><disk/></devices></domain>"
    found = {note.what: note.why for note in notes_of_domain(read_domain(text, "here"))}
    assert list(found) == ["novelty", "gadget"]
    assert all("does not know" in why for why in found.values())


@pytest.mark.parametrize(
    ("memory", "listed"),
    [
        ("<memory unit='MiB'>64</memory><currentMemory unit='KiB'>65536</currentMemory>", False),
        ("<memory unit='MB'>64</memory><currentMemory unit='b'>64000000</currentMemory>", False),
        ("<memory>65536</memory><currentMemory unit='MiB'>64</currentMemory>", False),
        ("<memory unit='MiB'>64</memory><currentMemory unit='MiB'>32</currentMemory>", True),
        ("<memory unit='MiB'>64</memory><currentMemory unit='parsec'>64</currentMemory>", True),
    ],
)
def test_a_balloon_that_libvirt_set_is_listed_whatever_the_units(memory: str, listed: bool) -> None:
    root = read_domain(f"<domain type='kvm'><name>a</name>{memory}</domain>".encode(), "here")
    assert ("currentMemory" in [note.what for note in notes_of_domain(root)]) is listed
