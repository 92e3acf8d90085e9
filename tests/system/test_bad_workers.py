# SPDX-License-Identifier: Apache-2.0
"""The broker's other doors: whatever comes in at the workers' socket and at the zygote's is counted and dropped, and harms nobody."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

import msgspec

from vmloop.client.session import Host
from vmloop.client.vm import Vm
from vmloop.common.pack import pack
from vmloop.common.wire import Kind, Message, decode, encode
from vmloop.common.zygote_wire import Drop, Fork, Keep

from .doors import door, open_files
from .site import Site, wait_for


def said(kind: Kind, name: str, body: object = None, **fields: Any) -> bytes:
    """What a worker of that VM would say."""
    packed = body if isinstance(body, bytes) else pack(body)
    return encode(Message(kind=kind, service=f"vm/{name}", body=packed, **fields))


def is_dropped(site: Site, host: Host, *frames: bytes) -> bool:
    """Whether the broker drops a message at the workers' socket, says so, and serves on."""
    before = site.log().count("message dropped")
    with door(site.paths.worker_socket) as worker:
        worker.send(*frames)
        dropped = wait_for(lambda: site.log().count("message dropped") == before + 1)
    host.ping()
    return bool(dropped)


def test_garbage_at_the_workers_socket_is_dropped(site: Site, host: Host, beside: Vm) -> None:
    chance = random.Random(22)
    with door(site.paths.worker_socket) as worker:
        for _ in range(500):
            worker.send(*(chance.randbytes(chance.choice((0, 4, 39, 40, 100))) for _ in range(chance.randint(1, 4))))
        real = said(Kind.STATUS, "beside", {"state": "shutoff"})
        for _ in range(500):
            damaged = bytearray(real)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(4, len(damaged))] = chance.randrange(256)
            damaged[4] = chance.choice((0, 1, 7, 8, 9, 200))
            worker.send(bytes(damaged))
        assert wait_for(lambda: "(1000 so far)" in site.log())
    assert "Traceback" not in site.log()
    assert [vm.name for vm in host.list()] == ["beside"]


def test_a_hello_for_what_is_no_name_is_dropped(site: Site, host: Host, beside: Vm) -> None:
    for name in ("a/b", "..", "", "n" * 65, "ä"):
        assert is_dropped(site, host, said(Kind.HELLO, name, {"worker_pid": os.getpid(), "incarnation": 9})), name
    assert [vm.name for vm in host.list()] == ["beside"]


def test_a_hello_without_a_map_is_dropped(site: Site, host: Host, beside: Vm) -> None:
    for body in (b"\xc1", pack([1]), b"\x91" * 5000 + b"\x90"):
        assert is_dropped(site, host, said(Kind.HELLO, "beside", body)), body[:9]


def test_a_hello_of_a_process_that_is_no_worker_makes_no_vm(site: Site, host: Host, beside: Vm) -> None:
    broker = host.version().pid
    before = open_files(broker)
    for pid in (0, -1, 1, 2**22 + 1, 2**40, 2**63, "1", None, [1]):
        status = {"worker_pid": pid, "incarnation": 1, "state": "running"}
        with door(site.paths.worker_socket) as worker:
            worker.send(said(Kind.HELLO, "ghost", status))
            worker.send(said(Kind.HELLO, "beside", {"worker_pid": os.getpid(), "incarnation": 0}))
            said_first = decode(*worker.receive()).op
            if said_first == "keep":  # it was a worker until its pid was found to be nobody's
                said_first = decode(*worker.receive()).op
            assert said_first == "leave"  # so the one before has been dealt with
            assert wait_for(lambda: [vm.name for vm in host.list()] == ["beside"]), pid
    assert wait_for(lambda: open_files(broker) == before)
    assert "Traceback" not in site.log()


def test_a_hello_of_an_older_incarnation_is_told_to_leave(site: Site, host: Host, beside: Vm) -> None:
    with door(site.paths.worker_socket) as worker:
        worker.send(said(Kind.HELLO, "beside", {"worker_pid": os.getpid(), "incarnation": 0}))
        (frame,) = worker.receive()
        message = decode(frame)
        assert (message.kind, message.op) == (Kind.CONTROL, "leave")


def test_a_status_from_somebody_else_is_dropped(site: Site, host: Host, beside: Vm) -> None:
    for kind in (Kind.STATUS, Kind.BYE):
        assert is_dropped(site, host, said(kind, "beside", {"state": "shutoff", "alive": False, "forget": True}))
        assert is_dropped(site, host, said(kind, "nobody", {"state": "running"}))
    assert beside.show().state == "running"


def test_answers_to_nobodys_request_change_nothing(site: Site, host: Host, beside: Vm) -> None:
    with door(site.paths.worker_socket) as worker:
        for kind in (Kind.REPLY, Kind.PARTIAL, Kind.ERROR):
            for number in (0, 1, 2**63, 2**64 - 1):
                worker.send(said(kind, "beside", {"code": "internal"}, id=number))
        worker.send(b"the end")
        assert wait_for(lambda: "message dropped" in site.log())
    assert "Traceback" not in site.log()
    assert beside.qmp("query-name") == {}


# -- the zygote -----------------------------------------------------------------------------------------------------------


def zygote_of(site: Site) -> int:
    return next(
        pid for pid, command in site.processes().items() if "vmloop.broker.zygote" in command and _is_zygote(pid)
    )


def _is_zygote(pid: int) -> bool:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip() == "vml-zygote"


def hangs_up(site: Site, packet: bytes, fds: list[int] | None = None) -> bool:
    """Whether the zygote ends the connection over a packet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10.0)
        connection.connect(str(site.paths.zygote_socket))
        socket.send_fds(connection, [packet], fds or [])
        return connection.recv(16) == b""


def test_packets_that_make_no_sense_cost_their_sender_the_connection(site: Site, host: Host, beside: Vm) -> None:
    zygote = zygote_of(site)
    assert hangs_up(site, b"\xc1")  # from the first complaint on its log is open
    before = open_files(zygote)
    chance = random.Random(23)
    packets = [
        b"\x00",
        b"\xc1",
        b"{}",
        pack({"type": "Fork"}),
        pack({"type": "Nonsense"}),
        pack([1, 2]),
        b"\x91" * 5000,
    ]
    packets += [chance.randbytes(chance.randint(1, 300)) for _ in range(100)]
    for packet in packets:
        assert hangs_up(site, packet), packet
    with open("/dev/null") as null:
        assert hangs_up(site, b"\xc1", [null.fileno()] * 4)
        assert hangs_up(site, msgspec.msgpack.encode(Keep("beside", "monitor")), [null.fileno()] * 9)
    assert wait_for(lambda: open_files(zygote) == before)
    assert zygote_of(site) == zygote


def test_packets_in_the_wrong_place_are_survived_and_leak_no_file(site: Site, host: Host, beside: Vm) -> None:
    zygote = zygote_of(site)
    assert hangs_up(site, b"\xc1")  # from the first complaint on its log is open
    before = open_files(zygote)
    with open("/dev/null") as null, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10.0)
        connection.connect(str(site.paths.zygote_socket))
        for packet, count in [
            (Keep("nobody", "x"), 0),
            (Keep("nobody", "x"), 2),
            (Drop("nobody"), 1),
            (Keep("nobody", "x"), 1),
        ]:
            socket.send_fds(connection, [msgspec.msgpack.encode(packet)], [null.fileno()] * count)
        connection.send(msgspec.msgpack.encode(Drop("nobody")))
        connection.send(msgspec.msgpack.encode(Fork("nobody", b"\xc1")))
        assert msgspec.msgpack.decode(connection.recv(65536))["type"] == "NotForked"
    assert wait_for(lambda: open_files(zygote) == before)
    site.define(host, "after")  # needs a fork
    assert host.vm("after").start().state == "running"
