# SPDX-License-Identifier: Apache-2.0
"""Memory in huge pages, which libvirt without a daemon refuses: it is asked for a file, and the answer names the huge pages."""

from __future__ import annotations

import shlex
from xml.etree.ElementTree import Element, fromstring

import pytest

from vmloop.client.libvirt.huge_pages import host_mounts, place_of
from vmloop.client.libvirt.importing import Imported, import_domain
from vmloop.client.libvirt.virsh import Translated

OWN = "/tmp/vmloop-import-x"
MOUNTS = """proc /proc proc rw 0 0
hugetlbfs /mnt/a\\040b hugetlbfs rw,relatime,pagesize=2M 0 0
none /mnt/1G hugetlbfs rw,pagesize=1024M 0 0
tmpfs /mnt/tmp tmpfs rw,pagesize=4K 0 0
torn
"""


def imported(backing: str, answer: str) -> tuple[Imported, Element]:
    """A domain with this <memoryBacking>, for whose memory libvirt has this object; and what libvirt was given of it."""
    given: list[bytes] = []

    def translate(xml: bytes) -> Translated:
        given.append(xml)
        return Translated(f"/bin/qemu -object {shlex.quote(answer)}", OWN)

    text = f"<domain type='qemu'><name>a</name><memoryBacking>{backing}</memoryBacking></domain>"
    found = import_domain(text.encode(), "x", translate, exists=lambda _: True, mounts=lambda: MOUNTS)
    element = fromstring(given[0]).find("memoryBacking")
    assert element is not None
    return found, element


@pytest.mark.parametrize(
    ("pages", "place"),
    [
        ("<hugepages/>", "/mnt/a b"),
        ("<hugepages><page size='2048'/></hugepages>", "/mnt/a b"),
        ("<hugepages><page size='1' unit='GiB'/></hugepages>", "/mnt/1G"),
        ("<hugepages><page size='16' unit='MiB'/></hugepages>", "/dev/hugepages"),
    ],
)
def test_memory_is_in_the_huge_pages_of_its_size_and_allocated_at_once(pages: str, place: str) -> None:
    answer = f'{{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"{OWN}/lib/qemu/ram/-1-a/pc.ram","size":4}}'
    found, given = imported(f"{pages}<access mode='shared'/><source type='anonymous'/>", answer)
    assert [(each.tag, each.attrib) for each in given] == [
        ("access", {"mode": "shared"}),
        ("source", {"type": "file"}),
    ]
    made = f'{{"qom-type":"memory-backend-file","id":"pc.ram","mem-path":"{place}","size":4,"prealloc":true}}'
    assert found.definition.qemu.args == ["-object", made]


def test_an_older_answer_gets_them_in_its_own_form() -> None:
    path = "/var/lib/libvirt/qemu/ram/7-a/ram-node0"
    found, _ = imported("<hugepages/>", f"memory-backend-file,id=ram-node0,mem-path={path},share=yes")
    made = "memory-backend-file,id=ram-node0,mem-path=/mnt/a b,share=yes,prealloc=on"
    assert found.definition.qemu.args == ["-object", made]


@pytest.mark.parametrize(
    "backing",
    [
        "<hugepages><page size='2048' nodeset='0'/></hugepages>",
        "<hugepages><page size='2048'/><page size='1048576'/></hugepages>",
        "<hugepages><page size='some'/></hugepages>",
        "<hugepages/><source type='memfd'/>",
        "<source type='file'/>",
    ],
)
def test_what_libvirt_itself_must_choose_it_is_given(backing: str) -> None:
    _, given = imported(backing, "memory-backend-memfd,id=m,hugetlb=true")
    wanted = fromstring(f"<memoryBacking>{backing}</memoryBacking>")
    assert [(each.tag, each.attrib) for each in given.iter()] == [(each.tag, each.attrib) for each in wanted.iter()]


def test_memory_in_a_plain_file_stays_in_one() -> None:
    found, _ = imported("<source type='file'/>", f"memory-backend-file,id=m,mem-path={OWN}/lib/qemu/ram/-1-a/m")
    assert found.definition.qemu.args == ["-object", "memory-backend-file,id=m,mem-path=."]


def test_this_hosts_mounts_can_be_read() -> None:
    assert " /proc proc " in host_mounts()
    assert place_of(3, host_mounts()) == "/dev/hugepages"
