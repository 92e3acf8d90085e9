# SPDX-License-Identifier: Apache-2.0
"""What a guest wants of the host's network: NIC_RX_FILTER_CHANGED, RDMA_GID_STATUS_CHANGED. Called by the dispatcher through shipped.py.

vmloop tells it and changes nothing on the host: the interfaces are the operator's, it may have no right to them, and a guest that
chooses the MAC addresses and multicast groups of a host's interface is something to be trusted with first (libvirt asks for
trustGuestRxFilters).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any, Final

from ..events import Event
from . import fields
from .context import VmContext
from .devices import QUERY_SECONDS, add_to_fact

_MODES: Final = ("multicast", "unicast", "vlan")
_FLAGS: Final = ("promiscuous", "broadcast-allowed", "multicast-overflow", "unicast-overflow")
_TABLES: Final = ("unicast-table", "multicast-table")

IPV6_PREFIX: Final = 64  # bits; of the networks that the two kinds of address are in, as libvirt has them
IPV4_PREFIX: Final = 24


async def rx_filter_changed(vm: VmContext, event: Event) -> None:
    """NIC_RX_FILTER_CHANGED. Asks for the filter: QEMU tells of the next change only then.

    Event NIC_RX_FILTER {name, filter}; fact `rx_filters` {name: filter}.

    A device without an id has no name to ask by, so all are asked for.
    """
    name = fields.text(event.data, "name")
    reply = await vm.qmp("query-rx-filter", {"name": name} if name else None, seconds=QUERY_SECONDS)
    for item in fields.items(reply):
        found = rx_filter(item)
        of = name or fields.text(item, "name")
        add_to_fact(vm, "rx_filters", of, found)
        vm.emit("NIC_RX_FILTER", {"name": of, "filter": found})


def rx_filter(item: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of query-rx-filter, checked and in bounds; a table of every VLAN becomes `vlan` = all alone. Pure."""
    found: dict[str, Any] = {"main-mac": fields.text(item, "main-mac")}
    found |= {mode: fields.text(item, mode) for mode in _MODES if fields.text(item, mode)}
    found |= {name: value for name in _FLAGS if (value := fields.flag(item, name)) is not None}
    found |= {table: _some(item.get(table), str) for table in _TABLES}
    if found.get("vlan") != "all":
        found["vlan-table"] = _some(item.get("vlan-table"), int)
    return found


async def rdma_gid_changed(vm: VmContext, event: Event) -> None:
    """RDMA_GID_STATUS_CHANGED. Event RDMA_ADDRESS {netdev, address, prefix, added}.

    An address that the host's interface should have, or should have no longer.
    """
    netdev = fields.text(event.data, "netdev")
    address = gid_address(event.data)
    added = fields.flag(event.data, "gid-status")
    if netdev and address is not None and added is not None:
        prefix = IPV6_PREFIX if address.version == 6 else IPV4_PREFIX
        vm.emit("RDMA_ADDRESS", {"netdev": netdev, "address": str(address), "prefix": prefix, "added": added})


def gid_address(data: Mapping[str, Any]) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a GID stands for; None if the event has none. Pure.

    QEMU gives both halves of the 16 bytes as numbers of the host's byte order (little-endian where RDMA devices are): 33022 is fe80::/64.
    Without a subnet prefix it is an IPv4 address, ::ffff:a.b.c.d.
    """
    subnet, interface = fields.number(data, "subnet-prefix"), fields.number(data, "interface-id")
    if subnet is None or interface is None:
        return None
    if subnet == 0:
        return ipaddress.IPv4Address(interface.to_bytes(8, "little")[4:])
    return ipaddress.IPv6Address(subnet.to_bytes(8, "little") + interface.to_bytes(8, "little"))


def _some(listed: object, kind: type) -> list[Any]:
    found = listed if isinstance(listed, list) else []
    return [fields.plain(item) for item in found[: fields.MAX_ITEMS] if type(item) is kind]
