# SPDX-License-Identifier: Apache-2.0
"""A recording as something to play: which answer a command gets, in what order, where the events are, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import ConfigError
from vmloop.worker.qemu.recording import Entry, Header, Recording
from vmloop.worker.qemu.simulated_script import Exchange, Script, reply_to

GREETING: dict[str, Any] = {"QMP": {"version": {}}}


class Tape:
    """Lines of a recording, a second apart."""

    def __init__(self) -> None:
        self.lines = [Entry(0.0, qemu=GREETING)]

    def client(self, command: str, identity: Any = None, **arguments: Any) -> Tape:
        request: dict[str, Any] = {"execute": command, "arguments": arguments}
        return self._add(client=request if identity is None else {**request, "id": identity})

    def says(self, **message: Any) -> Tape:
        return self._add(qemu=message)

    def event(self, name: str) -> Tape:
        return self.says(event=name)

    def closed(self, who: Any) -> Tape:
        return self._add(closed=who)

    def script(self) -> Script:
        return Script(Recording("tape", Header(1, "", "7.2.22"), tuple(self.lines)))

    def _add(self, **part: Any) -> Tape:
        self.lines.append(Entry(float(len(self.lines)), **part))
        return self


def taken(script: Script, command: str, **arguments: Any) -> Exchange:
    found = script.take({"execute": command, "arguments": arguments, "id": "live"})
    assert isinstance(found, Exchange), found
    return found


def refused(script: Script, command: str, **arguments: Any) -> str:
    found = script.take({"execute": command, "arguments": arguments})
    assert isinstance(found, str), found
    return found


def value(exchange: Exchange) -> Any:
    assert exchange.reply is not None
    return exchange.reply.message["return"]


def names(said: list[Any]) -> list[str]:
    return [line.message["event"] for line in said]


def test_a_command_that_was_given_twice_is_answered_in_order() -> None:
    tape = Tape().client("stop").says(**{"return": 1}).client("stop").says(**{"return": 2})
    script = tape.script()
    assert [value(taken(script, "stop")), value(taken(script, "stop"))] == [1, 2]
    assert refused(script, "stop") == "tape: stop was given more often than in the recording"


def test_a_query_that_is_asked_more_often_is_answered_as_the_last_time_without_its_events() -> None:
    tape = Tape().client("query-status").event("STOP").says(**{"return": 1}).event("RESUME")
    script = tape.script()
    first, again = taken(script, "query-status"), taken(script, "query-status")
    assert (names(first.before), names(first.after)) == (["STOP"], ["RESUME"])
    assert (value(again), again.before, again.after, again.ends) == (1, [], [], False)


def test_answers_go_by_the_arguments_whatever_their_order() -> None:
    tape = Tape().client("a", x=1, y=2).says(**{"return": "one"}).client("a", x=2).says(**{"return": "two"})
    script = tape.script()
    assert value(taken(script, "a", x=2)) == "two"
    assert value(taken(script, "a", y=2, x=1)) == "one"


def test_replies_out_of_order_go_to_the_commands_with_their_ids() -> None:
    tape = Tape().client("slow", 1).client("fast", 2)
    tape.says(**{"return": "fast", "id": 2}).event("E").says(**{"return": "slow", "id": 1})
    script = tape.script()
    assert value(taken(script, "fast")) == "fast"
    slow = taken(script, "slow")
    assert (value(slow), names(slow.before)) == ("slow", ["E"])


def test_an_event_stands_before_the_reply_or_after_it_as_it_came() -> None:
    tape = Tape().event("EARLY").client("stop").event("STOP").says(**{"return": {}}).event("LATE").client("x")
    script = tape.script()
    stop = taken(script, "stop")
    assert names(script.opening) == ["EARLY"]
    assert (names(stop.before), names(stop.after)) == (["STOP"], ["LATE"])
    assert [stop.before[0].after, stop.after[0].after] == [1.0, 1.0]


def test_a_command_that_was_never_answered_is_not_answered() -> None:
    script = Tape().client("stop").closed("client").script()
    stop = taken(script, "stop")
    assert (stop.reply, stop.ends) == (None, False)


def test_the_end_comes_after_the_last_answer_if_qemu_closed() -> None:
    script = Tape().client("quit").says(**{"return": {}}).event("SHUTDOWN").closed("qemu").script()
    end = taken(script, "quit")
    assert end.ends
    assert names(end.after) == ["SHUTDOWN"]


def test_what_several_clients_said_is_one_recording() -> None:
    tape = Tape().client("a").closed("client").says(**GREETING).client("b").says(**{"return": "b"})
    assert value(taken(tape.script(), "b")) == "b"


def test_a_refusal_says_what_is_recorded_and_keeps_secrets() -> None:
    tape = Tape().client("object-add", id="s").says(**{"return": {}}).client("stop").says(**{"return": {}})
    script = tape.script()
    assert refused(script, "cont") == "tape: cont was not recorded; recorded were object-add, stop"
    said = refused(script, "object-add", **{"qom-type": "secret", "data": "hunter2"})
    assert said.startswith("tape: object-add was not recorded with the arguments {")
    assert "hunter2" not in said


def test_a_command_with_another_secret_is_found() -> None:
    hidden = {"qom-type": "secret", "data": "(hidden)"}
    script = Tape().client("object-add", **hidden).says(**{"return": "made"}).script()
    assert value(taken(script, "object-add", **{"qom-type": "secret", "data": "another"})) == "made"


def test_a_password_that_was_written_into_the_file_by_hand_is_found_too() -> None:
    by_hand = {"protocol": "vnc", "password": "w"}
    script = Tape().client("set_password", **by_hand).says(**{"return": "set"}).script()
    assert value(taken(script, "set_password", **by_hand)) == "set"


def test_the_negotiation_is_found_whatever_a_client_enables() -> None:
    script = Tape().client("qmp_capabilities", enable=["oob"]).says(**{"return": {}}).script()
    assert value(taken(script, "qmp_capabilities")) == {}
    assert value(taken(script, "qmp_capabilities", enable=[])) == {}


def test_what_is_left_unplayed_is_known() -> None:
    script = Tape().client("a").says(**{"return": 1}).client("b").says(**{"return": 1}).script()
    taken(script, "a")
    assert script.unplayed() == ["b"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["stop", "cont", "query-x"]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)
        ),
        max_size=12,
    ),
    st.integers(0, 2),
)
def test_whoever_says_the_same_hears_the_same(steps: list[tuple[str, int, int, int]], early: int) -> None:
    tape = Tape()
    for _ in range(early):
        tape.event("EARLY")
    for number, (command, argument, before, after) in enumerate(steps):
        tape.client(command, number, value=argument)
        for one in range(before):
            tape.event(f"BEFORE_{number}_{one}")
        tape.says(**{"return": number, "id": number})
        for one in range(after):
            tape.event(f"AFTER_{number}_{one}")
    script = tape.script()
    heard = [GREETING, *(said.message for said in script.opening)]
    for number, (command, argument, _, _) in enumerate(steps):
        exchange = taken(script, command, value=argument)
        assert exchange.reply is not None
        reply = reply_to({"id": number}, exchange.reply.message)
        heard += [*(said.message for said in exchange.before), reply, *(said.message for said in exchange.after)]
    assert heard == [line.qemu for line in tape.lines if isinstance(line.qemu, dict)]
    assert script.unplayed() == []


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "greeting is not in it"),
        ([Entry(0.0, qemu=GREETING), Entry(0.0, qemu={"return": 1})], "line 3: a reply before any command"),
        ([Entry(0.0, qemu={"hello": 1})], "line 2: neither a greeting nor a reply nor an event"),
    ],
)
def test_lines_that_are_no_dialogue_are_refused(lines: list[Entry], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Script(Recording("tape", Header(1, "", ""), tuple(lines)))


def test_a_reply_has_the_live_id_where_qemu_puts_it() -> None:
    assert reply_to({"id": 5}, {"return": {}, "id": 1}) == {"return": {}, "id": 5}
    assert list(reply_to({"id": 5}, {"return": {}, "id": 1})) == ["return", "id"]
    assert list(reply_to({"id": 5}, {"id": 1, "error": {}})) == ["id", "error"]
    assert reply_to({}, {"return": {}, "id": 1}) == {"return": {}}
