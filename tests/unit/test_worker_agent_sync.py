# SPDX-License-Identifier: Apache-2.0
"""worker/agent/sync.py: whose a reply is, whatever the guest says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.errors import BadRequest
from vmloop.worker.agent.sync import Conversation, NotAReply, Whose, encode_command, read_reply

COMPLAINT = b'{"error": {"class": "GenericError", "desc": "JSON parse error, stray"}}'


def sync_number(line: bytes) -> int:
    assert line[:1] == b"\xff"
    request = json.loads(line[1:])
    number: int = request["arguments"]["id"]
    assert request["id"] == number
    assert 0 < number < 1 << 63
    return number


def take(conversation: Conversation, **content: Any) -> tuple[Whose, int]:
    return conversation.take(read_reply(json.dumps(content).encode()))


def in_step(*, ids: bool = True) -> Conversation:
    conversation = Conversation()
    number = sync_number(conversation.sync())
    assert conversation.take(read_reply(COMPLAINT)) == (Whose.STALE, 0)
    assert take(conversation, **{"return": number, **({"id": number} if ids else {})}) == (Whose.SYNC, 0)
    return conversation


def test_a_late_reply_is_told_by_its_id() -> None:
    conversation = in_step()
    conversation.sent(11)
    conversation.give_up()
    sync = sync_number(conversation.sync())
    assert take(conversation, **{"return": {}, "id": 11}) == (Whose.LATE, 11)
    assert take(conversation, **{"return": {}, "id": 11}) == (Whose.NOISE, 0)
    assert take(conversation, **{"return": sync, "id": sync}) == (Whose.SYNC, 0)


def test_a_late_reply_without_id_is_the_oldest_ones() -> None:
    conversation = in_step(ids=False)
    conversation.sent(11)
    conversation.give_up()
    conversation.sent(12)
    conversation.give_up()
    sync = sync_number(conversation.sync())
    assert conversation.take(read_reply(COMPLAINT)) == (Whose.STALE, 0)
    assert take(conversation, **{"return": {}}) == (Whose.LATE, 11)
    assert take(conversation, **{"return": {}}) == (Whose.LATE, 12)
    assert take(conversation, **{"return": {}}) == (Whose.NOISE, 0)
    assert take(conversation, **{"return": sync}) == (Whose.SYNC, 0)


def test_only_the_newest_sync_counts() -> None:
    conversation = Conversation()
    first = sync_number(conversation.sync())
    second = sync_number(conversation.sync())
    assert take(conversation, **{"return": first}) == (Whose.STALE, 0)
    assert not conversation.synced
    assert take(conversation, **{"return": second}) == (Whose.SYNC, 0)


def test_where_ids_are_repeated_a_reply_without_one_is_noise_but_a_parse_error_is_the_answer() -> None:
    conversation = in_step()
    conversation.sent(5)
    assert take(conversation, **{"return": {}}) == (Whose.NOISE, 0)
    assert conversation.take(read_reply(COMPLAINT)) == (Whose.ANSWER, 5)


@pytest.mark.parametrize("value", [float("nan"), object(), "\ud800"])
def test_arguments_that_are_no_json_are_refused(value: object) -> None:
    try:
        line = encode_command("x", {"a": value}, 1)
    except BadRequest:
        return
    json.loads(line)  # or sent as something that is JSON


@given(
    st.binary(max_size=100)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_line_is_a_reply_or_not_one(line: bytes) -> None:
    try:
        reply = read_reply(line)
    except NotAReply:
        return
    Conversation().take(reply)


contents = st.fixed_dictionaries(
    {},
    optional={
        "return": st.integers() | st.dictionaries(st.text(), st.integers()) | st.none() | st.booleans() | st.floats(),
        "error": st.none() | st.text() | st.dictionaries(st.sampled_from(["class", "desc"]), st.text() | st.integers()),
        "id": st.integers() | st.text() | st.none() | st.lists(st.integers()),
    },
)


@given(st.lists(contents | st.sampled_from(["sync", "send", "give_up", "cut", "lost"])))
def test_a_guest_that_guesses_is_never_in_step(steps: list[Any]) -> None:
    conversation = Conversation()
    for number, step in enumerate(steps, 1 << 62):
        if step == "sync":
            conversation.sync()
        elif step == "send":
            if conversation.synced:
                conversation.sent(number)
        elif isinstance(step, str):
            getattr(conversation, step)()
        else:
            try:
                whose, _ = conversation.take(read_reply(json.dumps(step).encode()))
            except NotAReply:
                continue
            assert whose in (Whose.NOISE, Whose.STALE)
        assert not conversation.synced
