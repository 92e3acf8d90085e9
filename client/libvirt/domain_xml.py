# SPDX-License-Identifier: Apache-2.0
"""A domain's XML as an element tree, read with care: it may come from anywhere. Used by importing.py, inventory.py, preparation.py.

No document type is accepted, so there are no entities to expand and no files to fetch; size, depth and number of elements are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.etree.ElementTree import Element, TreeBuilder, tostring
from xml.parsers import expat

from ...common.errors import ConfigError

# A domain of hundreds of devices has 200 KiB; tools keep data of their own in <metadata>.
MAX_XML_BYTES: Final = 1024 * 1024
# libvirt's own schema nests a dozen deep (a long backing chain: one level for each image).
MAX_DEPTH: Final = 256
MAX_ELEMENTS: Final = 65536

QEMU_NAMESPACE: Final = "{http://libvirt.org/schemas/domain/qemu/1.0}"

# The virtualization types whose domains are run by QEMU.
QEMU_TYPES: Final = frozenset({"qemu", "kvm", "hvf"})


_UNITS: Final = {"b": 1, "bytes": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40} | {
    f"{letter}{ending}": factor
    for power, letter in enumerate("kmgt", 1)
    for ending, factor in (("b", 1000**power), ("ib", 1024**power))
}


def read_domain(text: bytes, origin: str) -> Element:
    """The <domain> of a QEMU or KVM guest. `ConfigError` for anything else; `origin` names the text."""
    root = _Reader(origin).read(text)
    if root.tag != "domain":
        raise ConfigError(f"{origin}: this is a <{root.tag:.64}>, not a <domain> (virsh dumpxml NAME prints one)")
    kind = root.get("type", "")
    if kind not in QEMU_TYPES:
        raise ConfigError(f"{origin}: a domain of type {kind[:64]!r} is not run by QEMU; only qemu and kvm are")
    if not child_text(root, "name"):
        raise ConfigError(f"{origin}: the domain has no <name>")
    return root


def domain_bytes(root: Element) -> bytes:
    """The tree as XML text."""
    return bytes(tostring(root, encoding="utf-8"))


def child_text(element: Element, path: str) -> str:
    """The text of a child without the space around it; empty if there is no such child."""
    return (element.findtext(path) or "").strip()


def children(element: Element, path: str) -> Iterator[tuple[int, Element]]:
    """The children at a path, numbered from 1 for people."""
    yield from enumerate(element.findall(path), 1)


def size_in_bytes(number: str, unit: str) -> int | None:
    """None if libvirt would not understand it either."""
    factor, text = _UNITS.get(unit.lower()), number.strip()
    return int(text) * factor if factor is not None and text.isascii() and text.isdigit() and len(text) < 20 else None


class _Reader:
    """One parse."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._tree = TreeBuilder()
        self._depth = 0
        self._elements = 0
        self._parser = expat.ParserCreate(namespace_separator="}")
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._tree.data
        self._parser.StartDoctypeDeclHandler = self._refuse_document_type

    def read(self, text: bytes) -> Element:
        if len(text) > MAX_XML_BYTES:
            raise ConfigError(f"{self._origin}: over {MAX_XML_BYTES} bytes")
        try:
            self._parser.Parse(text, True)
        except expat.ExpatError as error:
            raise ConfigError(f"{self._origin}: not XML: {error}") from error
        except (ValueError, LookupError) as error:  # an encoding that Python does not know, or of several bytes
            raise ConfigError(f"{self._origin}: its encoding cannot be read: {error}") from error
        return self._tree.close()

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        self._elements += 1
        if self._depth > MAX_DEPTH or self._elements > MAX_ELEMENTS:
            raise ConfigError(f"{self._origin}: more than {MAX_DEPTH} levels or {MAX_ELEMENTS} elements")
        self._tree.start(_qualified(name), {_qualified(key): value for key, value in attributes.items()})

    def _end(self, name: str) -> None:
        self._depth -= 1
        self._tree.end(_qualified(name))

    def _refuse_document_type(self, *_: object) -> None:
        raise ConfigError(f"{self._origin}: it declares a document type, and may so define entities: that is refused")


def _qualified(name: str) -> str:
    """As ElementTree writes names with a namespace."""
    return "{" + name if "}" in name else name
