# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes come in at the client door: what can be answered is answered with a code, the rest is counted and dropped."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import zmq

from vmloop.client.session import Host
from vmloop.common.majordomo import Dialect, Envelope, build_request
from vmloop.common.pack import pack
from vmloop.common.wire import HEADER, Kind

from .doors import Majordomo, door, open_files, request, resident_bytes
from .site import Site, wait_for

pytestmark = pytest.mark.usefixtures("beside")

MIB = 1 << 20
DEEP = b"\x91" * 100_000 + b"\xc0"  # arrays in arrays
DEEPER_THAN_QEMU = 700  # the simulated one, which has half of QEMU's limit


def header(kind: int = 1, service: int = 6, op: int = 4, key: int = 0, seconds: float = 1.0) -> bytes:
    """A header that says what it likes."""
    return HEADER.pack(b"VML1", kind, 0, service, op, 7, seconds, 0, key, 0)


def test_random_bytes_are_dropped_and_everybody_else_is_served(site: Site, host: Host) -> None:
    chance = random.Random(20)
    broker = host.version().pid
    with door(site.paths.client_socket) as client:
        assert client.is_silent()
        before = open_files(broker)
        for _ in range(500):
            frames = [
                chance.randbytes(chance.choice((0, 0, 1, 6, 39, 40, 41, 200))) for _ in range(chance.randint(1, 6))
            ]
            client.send(*frames)
        assert client.is_silent()
        assert open_files(broker) == before
    assert "message dropped" in site.log()
    assert "Traceback" not in site.log()


def test_damaged_frames_never_harm_the_broker(site: Site) -> None:
    """Real messages with a few bytes changed, frames added and taken away. Operations that change something are not among them."""
    chance = random.Random(21)
    envelope = Envelope(Dialect.V02, True, "vm/beside")
    samples = [
        [request("vm/beside", "show", {})],
        [request("vmloop", "list", key=b"k" * 16)],
        [request("vm/beside", "qmp", {"command": "query-status"}, seconds=0.5)],
        build_request(envelope, {"op": "qmp", "id": "a", "timeout": 0.5}, pack({"command": "query-name"})),
        build_request(Envelope(Dialect.V01, True, "vmloop"), {"op": "stats", "id": 1}),
    ]
    with door(site.paths.client_socket) as client:
        for _ in range(600):
            frames = list(chance.choice(samples))
            at = chance.randrange(len(frames))
            damaged = bytearray(frames[at])
            for _ in range(chance.randint(0, 3)):
                if damaged:
                    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            frames[at] = bytes(damaged)
            if chance.random() < 0.2:
                frames.insert(chance.randrange(len(frames) + 1), chance.randbytes(chance.randrange(20)))
            if chance.random() < 0.2 and len(frames) > 1:
                frames.pop(chance.randrange(len(frames)))
            client.send(*frames)
        client.send(request("vmloop", "ping", id=1 << 60))
        while int.from_bytes(client.receive()[-1][8:16], "little") != 1 << 60:
            pass
    assert "Traceback" not in site.log()


def test_what_cannot_be_answered_is_dropped(site: Site) -> None:
    unanswerable = [
        (b"",),
        (b"", b""),
        (b"",) * 9,
        (b"VML1",),
        (b"VML1" + b"\0" * 35,),
        (b"", request("vmloop", "ping")),
        (request("vmloop", "ping"), b""),
        (b"MDPC03",),
    ]
    with door(site.paths.client_socket) as client:
        for frames in unanswerable:
            client.send(*frames)
            assert client.is_silent(), frames
    assert site.log().count("message dropped") == len(unanswerable)


def test_native_frames_that_make_no_sense_get_bad_request_with_their_id(site: Site) -> None:
    wrong: list[tuple[bytes, str]] = [
        *((header(kind) + b"vmloopping", "kind 1") for kind in range(2, 10)),
        (header(0) + b"vmloopping", "kind 0"),
        (header(77) + b"vmloopping", "kind 77"),
        (header(), "lengths"),
        (header(service=255, op=255) + b"vmloopping", "lengths"),
        (header(key=65) + b"vmloopping" + b"k" * 65, "lengths"),
        (header(key=0xFFFFFFFF) + b"vmloopping", "lengths"),
        (header() + b"\xff\xfe\xfd\xfc\xfb\xfaping", "service"),
        (header() + b"vmloop\xff\xfe\xfd\xfc", "UTF-8"),
        (header(service=9) + b"vm/beside\xff\xfe\xfd\xfc", "UTF-8"),
        (header(service=0, op=0), "service"),
        *(
            (header(seconds=seconds) + b"vmloopping", "timeout")
            for seconds in (math.nan, math.inf, -math.inf, -1, 3601)
        ),
    ]
    with door(site.paths.client_socket) as client:
        for frame, text in wrong:
            body = client.error(frame)
            assert (body["code"], text in body["message"]) == ("bad-request", True), (frame, body)


def test_unknown_services_operations_and_arguments_are_named(site: Site) -> None:
    wrong: list[tuple[str, str, object, str]] = [
        ("nothing", "ping", None, "nothing"),
        ("vm/a/b", "show", None, "a/b"),
        ("vm/..", "show", None, "'..'"),
        ("vmloop", "nonsense", None, "there are: "),
        ("vm/beside", "nonsense", None, "there are: "),
        ("vmloop", "ping", {"loud": True}, "loud"),
        ("vmloop", "list", {"names": []}, "names"),
        ("vmloop", "stats", {"names": "beside"}, "names"),
        ("vmloop", "stats", {"names": [1]}, "names"),
        ("vmloop", "shutdown", {"vms": "all"}, "vms"),
        ("vmloop", "shutdown", {"vms": 1}, "vms"),
        ("vmloop", "define", {}, "definition"),
        ("vmloop", "define", {"definition": []}, "definition"),
        ("vmloop", "define", {"definition": {}}, "name"),
        ("vmloop", "undefine", {"name": None}, "name"),
        ("vmloop", "attach", {"name": "x"}, "qmp"),
        ("vmloop", "attach", {"name": "x", "qmp": "/x", "pid": "1"}, "pid"),
        ("vmloop", "attach", {"name": "x", "qmp": "relative"}, "absolute"),
        ("vmloop", "attach", {"name": "x", "qmp": "/zero\0byte"}, "absolute"),
        ("vm/beside", "show", {"deep": 1}, "deep"),
        ("vm/beside", "wait", {"for": "tea"}, "tea"),
        ("vm/beside", "wait", {}, "for"),
        ("vm/beside", "stop", {"timeout": -1}, "timeout"),
        ("vm/beside", "stop", {"timeout": "soon"}, "timeout"),
        ("vm/beside", "kill", {"hard": True}, "hard"),
        ("vm/beside", "qmp", {}, "command"),
        ("vm/beside", "qmp", {"command": ""}, "command"),
        ("vm/beside", "qmp", {"command": "c" * 201}, "command"),
        ("vm/beside", "qmp", {"command": "stop", "arguments": []}, "arguments"),
        ("vm/beside", "qmp", {"command": "query-status", "oob": 1}, "oob"),
        ("vm/beside", "qmp", {"command": "query-status", "comand": 1}, "comand"),
        ("vm/beside", "hmp", {"line": 5}, "line"),
        ("vm/beside", "events", {"since": "yesterday"}, "yesterday"),
        ("vm/beside", "events", {"limit": 0}, "limit"),
    ]  # fmt: skip
    with door(site.paths.client_socket) as client:
        for service, op, arguments, text in wrong:
            message, body = client.ask(service, op, arguments)
            found = (message.kind, body["code"], text in body["message"])
            assert found == (Kind.ERROR, "bad-request", True), (service, op, arguments, body)
        assert client.ask("vm/nobody", "show")[1]["code"] == "no-such-vm"
        assert client.ask("vm/nobody", "kill")[1]["code"] == "no-such-vm"
        assert [vm["name"] for vm in client.ask("vmloop", "list")[1]] == ["beside"]


def test_bodies_that_are_no_msgpack_map_get_bad_request(site: Site) -> None:
    damaged = [b"\xc1", b"\x93\x01", DEEP, pack({}) + b"\x00", b"\xdf\xff\xff\xff\xff", b"\x81\xa1\xff\x01"]
    bodies = [*damaged, pack([1]), pack("text"), pack({1: 2})]
    operations = [("vmloop", "list"), ("vmloop", "define"), ("vm/beside", "show"), ("vm/beside", "qmp")]
    with door(site.paths.client_socket) as client:
        for body, (service, op) in itertools.product(bodies, operations):
            message, answer = client.ask(service, op, body=body)
            assert (message.kind, answer["code"]) == (Kind.ERROR, "bad-request"), (op, body[:20], answer)


def test_arguments_nested_deeper_than_json_may_be_get_bad_request(site: Site) -> None:
    with door(site.paths.client_socket) as client:
        for value in (deep(1010), b"\x81\xa2at" + deep(1000)):
            body = pack({"command": "query-status", "arguments": {"value": None}}).replace(b"\xc0", value)
            _, answer = client.ask("vm/beside", "qmp", body=body)
            assert answer["code"] == "bad-request", answer


def test_arguments_nested_deeper_than_qemu_takes_cost_only_their_own_command(site: Site) -> None:
    """QEMU's answer to them has no id: nobody can know whose it is."""
    body = pack({"command": "query-status", "arguments": {"value": None}}).replace(b"\xc0", deep(DEEPER_THAN_QEMU))
    with door(site.paths.client_socket) as client:
        _, answer = client.ask("vm/beside", "qmp", body=body, seconds=0.3)
        assert answer["code"] == "deadline"
        message, _ = client.ask("vm/beside", "qmp", {"command": "query-status"}, seconds=2.0)
        assert message.kind is Kind.REPLY


def deep(depth: int) -> bytes:
    """msgpack of arrays in arrays."""
    return b"\x91" * depth + b"\x90"


def test_messages_over_16_mib_get_too_large_in_both_protocols(site: Site) -> None:
    with door(site.paths.client_socket) as client:
        body = client.error(request("vm/beside", "qmp", id=99, body=b"\0" * (17 * MIB)))
        assert (body["code"], body["limit"]) == ("too-large", 16 * MIB)
        for dialect in Dialect:
            majordomo = Majordomo(client, dialect, delimited=True)
            ((head, error),) = majordomo.ask("vm/beside", "qmp", b"\0" * (17 * MIB), id="big")
            assert (head["ok"], head["id"], error["code"]) == (False, "big", "too-large")


def test_a_message_over_the_transport_limit_costs_its_sender_the_connection(site: Site, host: Host) -> None:
    broker = host.version().pid
    with door(site.paths.client_socket) as client:
        assert client.is_silent()
        monitor = client.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        client.send(request("vm/beside", "qmp", body=b"\0" * (40 * MIB)))
        assert monitor.poll(10_000), "still connected"
        client.socket.disable_monitor()
        monitor.close()
        assert host.ping()
        assert client.is_silent()  # it connects again by itself
    assert wait_for(lambda: resident_bytes(broker) < 100 * MIB)


def test_majordomo_frames_that_make_no_sense_are_answered_where_the_service_is_known(site: Site) -> None:
    good = pack({"op": "ping", "id": 1})
    answered: list[tuple[list[bytes], str]] = [
        ([b"", b"MDPC01", b"vmloop"], "header"),
        ([b"", b"MDPC01", b"vmloop", good, b"", b""], "3 frames"),
        ([b"", b"MDPC01", b"vmloop", b"\xc1"], "header"),
        ([b"", b"MDPC01", b"vmloop", DEEP], "header"),
        ([b"", b"MDPC01", b"vmloop", pack({})], "op"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": 5})], "op"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "o" * 256})], "op"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "time": 5})], "time"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "timeout": "5"})], "timeout"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "timeout": -5})], "timeout"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "timeout": math.nan})], "timeout"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "timeout": 4000})], "timeout"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "key": "k" * 65})], "key"),
        ([b"", b"MDPC01", b"vmloop", pack({"op": "ping", "reading": 1})], "reading"),
        ([b"", b"MDPC01", b"s" * 300, good], "255"),
        ([b"", b"MDPC01", b"", good], "service"),
        ([b"", b"MDPC01", b"vmloop", good, b"\xc1"], "msgpack"),
    ]  # fmt: skip
    dropped = [
        [b"", b"MDPC01"],
        [b"MDPC02"],
        [b"MDPC02", b"\x01"],
        [b"MDPC02", b"\x02", b"vmloop", good],
        [b"MDPC02", b"", b"vmloop", good],
        [b"", b"MDPC01", b"\xff\xfe", good],
        [b"", b"", b"MDPC01", b"vmloop", good],
        [b"MDPW01", b"\x01", b"vmloop"],
    ]
    with door(site.paths.client_socket) as client:
        for frames, text in answered:
            client.send(*frames)
            final, head, error = Majordomo(client, Dialect.V01, delimited=True).receive(frames[2].decode())
            assert (final, head["ok"], error["code"]) == (True, False, "bad-request"), (frames, error)
            assert text in error["message"], error
        for frames in dropped:
            client.send(*frames)
            assert client.is_silent(), frames


def test_the_deepest_id_that_msgpack_takes_is_sent_back(site: Site, host: Host) -> None:
    """Also in an answer that is made when time is over, in the middle of the broker's loop."""
    with door(site.paths.client_socket) as client:
        majordomo = Majordomo(client, Dialect.V01, delimited=True)
        for depth in (0, 700, 1000, 1020, 1021, 1022, 1023, 1100):
            head = pack({"op": "wait", "timeout": 0.1, "id": None}).replace(b"\xc0", deep(depth))
            client.send(b"", b"MDPC01", b"vm/beside", head, pack({"for": "shutoff"}))
            _, answer, error = majordomo.receive("vm/beside")
            assert (answer["ok"], error["code"]) in ((False, "deadline"), (False, "bad-request"))
    assert host.ping()


def test_mmi_says_which_services_are_there(site: Site) -> None:
    absent = [b"vm/nobody", b"nothing", b"\xff", b""]
    asked = [(b"vmloop", b"200"), (b"vm/beside", b"200"), *((name, b"404") for name in absent)]
    with door(site.paths.client_socket) as client:
        for name, status in asked:
            client.send(b"", b"MDPC01", b"mmi.service", name)
            assert client.receive() == [b"", b"MDPC01", b"mmi.service", status]
            client.send(b"MDPC02", b"\x01", b"mmi.service", name)
            assert client.receive() == [b"MDPC02", b"\x03", b"mmi.service", status]
        client.send(b"", b"MDPC01", b"mmi.service")
        assert client.receive()[-1] == b"404"
        client.send(b"", b"MDPC01", b"mmi.workers", b"vmloop")
        assert client.receive() == [b"", b"MDPC01", b"mmi.workers", b"501"]


def test_a_client_that_asks_and_never_reads_costs_little_and_holds_up_nobody(site: Site, host: Host) -> None:
    broker = host.version().pid
    frame = request("vm/beside", "show", {})
    with door(site.paths.client_socket) as deaf:
        deaf.socket.setsockopt(zmq.RCVHWM, 1)
        before = resident_bytes(broker)
        slowest = 0.0
        for _ in range(30):
            for _ in range(1000):
                deaf.send(frame)
            began = time.monotonic()
            host.ping()
            host.vm("beside").qmp("query-status")
            slowest = max(slowest, time.monotonic() - began)
        print(f"slowest answer to somebody else: {slowest * 1000:.1f} ms")
        assert slowest < 2.0
        assert resident_bytes(broker) - before < 64 * MIB
    assert host.ping()


def test_the_1025th_request_in_flight_of_a_client_is_busy(site: Site, host: Host) -> None:
    site.define(host, "other")
    with door(site.paths.client_socket) as client:
        for number in range(1024):
            client.send(request("vm/other", "wait", {"for": "running"}, id=number, seconds=2.0))
        body = client.error(request("vmloop", "list", id=5000))
        assert (body["code"], "1024" in body["message"]) == ("busy", True)
        with door(site.paths.client_socket) as another:
            assert another.ask("vmloop", "list")[0].kind is Kind.REPLY
            assert another.ask("vm/other", "wait", {"for": "running"})[1]["code"] == "busy"  # the VM's own bound
        answers = [client.answer() for _ in range(1024)]
        assert {message.id for message, _ in answers} == set(range(1024))
        assert {body["code"] for _, body in answers} == {"deadline"}
        assert client.ask("vmloop", "list")[0].kind is Kind.REPLY


def test_a_vm_with_1024_requests_in_flight_can_still_be_killed(site: Site, host: Host) -> None:
    site.define(host, "other", "-simulate", "slow=60")
    with door(site.paths.client_socket) as client:
        client.send(request("vmloop", "start", {"name": "other"}))
        assert wait_for(lambda: host.vm("other").show().pid)
        for number in range(1024):
            client.send(request("vm/other", "wait", {"for": "crashed"}, id=number, seconds=20.0))
        client.send(request("vmloop", "ping", id=5000))
        while client.answer()[0].id != 5000:
            pass
        assert host.vm("other").kill().reason == "destroyed"
