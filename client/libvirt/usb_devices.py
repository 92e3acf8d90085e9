# SPDX-License-Identifier: Apache-2.0
"""USB devices of the host that a domain names by vendor and product. Used by preparation.py (stand-ins) and takeover.py.

libvirt looks for such a device when it starts the domain, and refuses to translate it before. QEMU looks for it by itself: libvirt is
given a place on a bus that no host has, and where that comes back in the arguments, vendor and product are put.
"""

from __future__ import annotations

import re
from typing import Final
from xml.etree.ElementTree import Element, SubElement

from .argv import Option, Properties
from .domain_xml import children
from .notes import Note, changed

_NO_BUS: Final = 999  # Linux counts buses from 1 up
_MOST: Final = 127  # devices on one bus
_ID: Final = re.compile(r"(?:0x)?([0-9A-Fa-f]{1,4})")

# In the arguments → (vendor, product).
Wanted = dict[str, tuple[int, int]]


def put_stand_ins(root: Element) -> tuple[Wanted, list[Note]]:
    """The tree is changed."""
    wanted: Wanted = {}
    notes: list[Note] = []
    for number, device in children(root, "devices/hostdev"):
        source = device.find("source")
        if device.get("type") != "usb" or source is None or source.find("address") is not None:
            continue
        ids = _id(source.find("vendor")), _id(source.find("product"))
        if ids[0] is None or ids[1] is None or len(wanted) == _MOST:
            continue  # libvirt says what is wrong with it
        at = len(wanted) + 1
        for child in list(source):
            source.remove(child)
        SubElement(source, "address", bus=str(_NO_BUS), device=str(at))
        wanted[f"/dev/bus/usb/{_NO_BUS}/{at:03}"] = ids[0], ids[1]
        notes.append(
            changed(
                f"hostdev {number}",
                f"QEMU takes the first {ids[0]:04x}:{ids[1]:04x} that is plugged in, also later, where libvirt looked once",
            )
        )
    return wanted, notes


def with_ids(option: Option, properties: Properties, wanted: Wanted) -> Option:
    """The device by vendor and product, if a stand-in was put for it."""
    place = properties.text("hostdevice") or _place_of(properties)
    if properties.text("driver") != "usb-host" or place not in wanted:
        return option
    vendor, product = wanted[place]
    ids = {"vendorid": vendor, "productid": product}
    mine = properties.without("hostdevice", "hostbus", "hostaddr")
    driver = {key: value for key, value in mine.values.items() if key == "driver"}
    return Option(option.name, Properties({**driver, **ids, **mine.values}, mine.is_json, mine.implied).render())


def _place_of(properties: Properties) -> str:
    """As older versions name it."""
    bus, device = (str(properties.values.get(key, "")) for key in ("hostbus", "hostaddr"))
    return f"/dev/bus/usb/{bus}/{device:0>3}"


def _id(element: Element | None) -> int | None:
    found = _ID.fullmatch(element.get("id", "")) if element is not None else None
    return int(found[1], 16) if found is not None else None
