# SPDX-License-Identifier: Apache-2.0
"""Guest memory in huge pages. Used by preparation.py (what libvirt is given), importing.py (where they are) and takeover.py.

Without a daemon libvirt knows no hugetlbfs, and refuses such a domain. It is asked for memory in a file, which differs in nothing but the
place and that it is allocated at once; both are put into its answer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from xml.etree.ElementTree import Element, SubElement

from .domain_xml import size_in_bytes

# Where systemd mounts it; named if none of that size is mounted.
USUAL_PLACE: Final = "/dev/hugepages"

_PAGE_SIZE: Final = re.compile(r"(?:.*,)?pagesize=([0-9]+)([KMG])(?:,.*)?")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")  # a space or tab in the name of a place
_FACTORS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def ask_for_a_file(root: Element) -> int | None:
    """The size of the pages, 0 if none is named; None without huge pages, and where libvirt itself must choose. The tree is changed."""
    backing = root.find("memoryBacking")
    pages = backing.find("hugepages") if backing is not None else None
    if backing is None or pages is None or backing.find("source[@type='memfd']") is not None:
        return None
    kinds = pages.findall("page")
    if len(kinds) > 1 or any(kind.get("nodeset") for kind in kinds):
        return None
    size = size_in_bytes(kinds[0].get("size", ""), kinds[0].get("unit", "KiB")) if kinds else 0
    if size is None:
        return None
    for element in [pages, *backing.findall("source")]:
        backing.remove(element)
    SubElement(backing, "source", type="file")
    return size


def place_of(size: int, mounts: str) -> str:
    """Where pages of this size are, by the text of /proc/mounts; the first place for 0."""
    for line in mounts.splitlines():
        _, place, kind, options, *_ = [*line.split(" "), "", "", "", ""]
        found = _PAGE_SIZE.fullmatch(options)
        if kind == "hugetlbfs" and (size == 0 or (found and int(found[1]) * _FACTORS[found[2]] == size)):
            return _ESCAPED.sub(lambda letter: chr(int(letter[1], 8)), place)
    return USUAL_PLACE


def host_mounts() -> str:
    """What is mounted here."""
    return Path("/proc/mounts").read_text(errors="replace")
