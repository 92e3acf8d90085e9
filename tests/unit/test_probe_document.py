# SPDX-License-Identifier: Apache-2.0
"""From a recorded dialogue to the document; and that whatever a QEMU answers there is one. No process, no socket."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmloop.common.capabilities import FORMAT, Capabilities, from_plain, part_about, to_plain
from vmloop.common.errors import BadRequest
from vmloop.common.pack import pack, unpack
from vmloop.worker.probe.document import document
from vmloop.worker.probe.probing import ANY, TCG
from vmloop.worker.probe.questions import PROBE, PROBE_TCG, RUNNING, Reply, due

from ..fakes.recorded_qemu import load

RECORDING = load()
REPLIES = RECORDING.replay(ANY, PROBE)
REPLIES_TCG = RECORDING.replay(TCG, PROBE_TCG)
WHOLE = RECORDING.document()

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "meta-type", "members", "type", "arch", "model", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


# -- the recorded QEMU ----------------------------------------------------------------------------------------------------


def test_the_document_of_the_recorded_qemu_says_who_it_is() -> None:
    assert (WHOLE.format, WHOLE.version, WHOLE.target) == (FORMAT, (7, 2, 22), "x86_64")
    assert WHOLE.package.startswith("Debian")
    assert WHOLE.binary == "/usr/bin/qemu-system-x86_64"


def test_names_are_lists_without_repetition_and_in_order() -> None:
    plain = to_plain(WHOLE)
    for key in (
        "commands",
        "events",
        "oob",
        "machines",
        "cpus",
        "device_types",
        "accelerators",
        "options",
        "migration",
    ):
        assert plain[key], key
        assert plain[key] == sorted(set(plain[key])), key


def test_what_the_recorded_qemu_can_do_is_found() -> None:
    assert WHOLE.oob == ["migrate-pause", "migrate-recover", "query-yank", "yank"]
    assert {"blockdev-add", "device_add", "query-yank"} <= set(WHOLE.commands)
    assert {"STOP", "DEVICE_DELETED"} <= set(WHOLE.events)
    assert {"q35", "pc-q35-7.2", "pc", "none"} <= set(WHOLE.machines)  # aliases among them
    assert {"kvm", "tcg"} == set(WHOLE.accelerators)
    assert WHOLE.device_aliases["virtio-net"] == "virtio-net-pci"
    assert "virtio-net-pci" in WHOLE.device_types
    assert "virtio-net" not in WHOLE.device_types
    assert WHOLE.device_properties["virtio-blk-pci"]["drive"] == "str"
    assert "max" in WHOLE.cpus
    assert WHOLE.expansion["host"]["props"]["fpu"] is True
    assert WHOLE.tcg is not None
    assert WHOLE.tcg["expansion"]["max"]["type"] == "full"
    assert "events" in WHOLE.migration
    assert WHOLE.kvm.enabled
    assert WHOLE.tpm == {"models": ["tpm-crb", "tpm-tis"], "types": ["emulator", "passthrough"]}
    assert "json-cli" in WHOLE.features
    assert "deprecated" not in WHOLE.features


def test_an_error_reply_is_noted_and_its_field_is_empty() -> None:
    assert WHOLE.sev is None
    assert "not enabled" in WHOLE.missing["query-sev-capabilities"]


def test_arguments_have_their_types_and_whether_they_must_be_given() -> None:
    assert WHOLE.arguments["device_del"].members == {"id": "str"}
    assert WHOLE.arguments["query-status"].members == {}
    assert WHOLE.arguments["device_add"].members["bus"] == "str?"
    assert WHOLE.arguments["blockdev-add"].tag == "driver"
    driver = WHOLE.arguments["blockdev-add"].members["driver"]
    assert "qcow2" in WHOLE.types[driver].values


def test_has_knows_commands_events_and_features() -> None:
    assert [WHOLE.has(name) for name in ("query-yank", "STOP", "json-cli", "nosuch", "deprecated")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_the_document_survives_json_and_the_wire() -> None:
    assert from_plain(msgspec.json.decode(msgspec.json.encode(to_plain(WHOLE)))) == WHOLE
    assert from_plain(unpack(pack(to_plain(WHOLE)))) == WHOLE


@pytest.mark.parametrize("type_", [None, "any", "2", "gone"])
def test_a_command_whose_arguments_are_not_described_is_left_out(type_: str | None) -> None:
    entry = {"name": "c", "meta-type": "command"} | ({"arg-type": type_} if type_ else {})
    found = document("", {"query-qmp-schema": Reply([entry, {"name": "any", "meta-type": "any"}, {"name": "2"}])})
    assert found.commands == ["c"]
    assert ("c" in found.arguments) is (type_ is None)


# -- old, other and strange QEMUs -----------------------------------------------------------------------------------------


def test_without_a_schema_the_commands_are_those_of_query_commands() -> None:
    found = document("", REPLIES | {"query-qmp-schema": Reply(error="CommandNotFound: no")})
    assert found.commands == WHOLE.commands
    assert (found.events, found.arguments) == ([], {})


def test_a_machine_without_the_fields_of_later_qemus_is_taken() -> None:
    """query-machines of QEMU 4.2 has neither default-cpu-type for all nor deprecated."""
    found = document("", {"query-machines": Reply([{"name": "virt", "cpu-max": 8}, {"name": "sun4u", "alias": "x"}])})
    assert found.machines == ["sun4u", "virt", "x"]
    assert found.machine_details["virt"] == {"name": "virt", "cpu-max": 8}


def test_what_a_later_qemu_says_beyond_what_is_known_is_kept() -> None:
    entry = {"name": "virt", "quantum": {"lanes": [1, 2]}, "big": 1 << 70}
    found = document("", {"query-machines": Reply([entry])})
    assert found.machine_details["virt"] == {"name": "virt", "quantum": {"lanes": [1, 2]}}


def test_an_enum_of_before_6_1_and_one_of_after_read_the_same() -> None:
    def schema(enum: dict[str, Any]) -> Reply:
        command = {"name": "c", "meta-type": "command", "arg-type": "1"}
        arguments = {"name": "1", "meta-type": "object", "members": [{"name": "a", "type": "2"}]}
        return Reply([command, arguments, {"name": "2", "meta-type": "enum", **enum}])

    old = document("", {"query-qmp-schema": schema({"values": ["x", "y"]})})
    new = document("", {"query-qmp-schema": schema({"members": [{"name": "x"}, {"name": "y"}]})})
    assert old.types == new.types
    assert old.types["2"].values == ["x", "y"]


@pytest.mark.parametrize(("target", "asked"), [("aarch64", True), ("arm", True), ("x86_64", False), ("riscv64", False)])
def test_gic_is_asked_of_arm_alone(target: str, asked: bool) -> None:
    replies = {"query-target": Reply({"arch": target}), "query-qmp-schema": Reply(), "query-commands": Reply()}
    assert ("query-gic-capabilities" in {question.name for question in due(PROBE, replies)}) is asked


def expansions(target: str, *accelerators: str, kvm: bool = False, command: bool = True) -> list[dict[str, Any]]:
    """The arguments of each query-cpu-model-expansion that a QEMU is asked which has answered so."""
    known = [{"name": name} for name in ("qom-list-types", *(["query-cpu-model-expansion"] if command else []))]
    replies = {
        "query-target": Reply({"arch": target}),
        "query-kvm": Reply({"enabled": kvm, "present": True}),
        "query-qmp-schema": Reply(error="CommandNotFound: no"),
        "query-commands": Reply(known),
        "qom-list-types/accel": Reply([{"name": f"{name}-accel"} for name in accelerators]),
    }
    asked = [question for question in due(PROBE, replies) if question.command == "query-cpu-model-expansion"]
    return [question.arguments or {} for question in asked]


def test_a_cpu_model_is_expanded_in_the_way_that_the_target_has() -> None:
    assert expansions("riscv64", "tcg") == [{"type": "full", "model": {"name": "max"}}]
    assert expansions("loongarch64", "tcg") == [{"type": "static", "model": {"name": "max"}}]
    assert expansions("s390x", "kvm", "tcg", kvm=True) == [{"type": "full", "model": {"name": "host"}}]


def test_a_qemu_without_the_command_is_not_asked_to_expand_a_cpu_model() -> None:
    assert expansions("sparc", "tcg", command=False) == []


def test_a_qemu_that_can_run_nothing_is_not_asked_to_expand_a_cpu_model() -> None:
    """Without KVM and TCG it would call everything a feature of its CPU."""
    assert expansions("x86_64", "kvm", "qtest") == []
    assert expansions("x86_64") != []  # it did not say what it has


def test_a_name_that_qemu_tells_twice_is_there_once() -> None:
    assert document("", {"query-tpm-models": Reply(["tpm-tis", "tpm-tis"])}).tpm == {"models": ["tpm-tis"]}


def test_what_the_schema_does_not_have_is_not_asked() -> None:
    schema = [entry for entry in REPLIES["query-qmp-schema"].value if not str(entry["name"]).startswith("query-tpm")]
    replies = {name: REPLIES[name] for name in ("query-version", "query-target", "query-kvm", "query-commands")}
    asked = {question.name for question in due(PROBE, replies | {"query-qmp-schema": Reply(schema)})}
    assert "query-machines" in asked
    assert not any(name.startswith("query-tpm") for name in asked)


def test_properties_are_asked_only_of_devices_that_are_there() -> None:
    replies = REPLIES | {"qom-list-types/device": Reply([{"name": "scsi-hd"}])}
    left = {name: reply for name, reply in replies.items() if not name.startswith("device-list-properties")}
    asked = [question.name for question in due(PROBE, left) if question.command == "device-list-properties"]
    assert asked == ["device-list-properties/scsi-hd"]


# -- whatever it answers ----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(sorted(REPLIES))), st.booleans())
def test_any_answers_replaced_by_errors_still_give_a_document(broken: set[str], also_tcg: bool) -> None:
    replies = {name: Reply(error="GenericError: no") if name in broken else reply for name, reply in REPLIES.items()}
    tcg = {name: Reply(error="GenericError: no") for name in REPLIES_TCG} if also_tcg else REPLIES_TCG
    found = document("/q", replies, tcg)
    assert broken <= set(found.missing)
    assert from_plain(unpack(pack(to_plain(found)))) == found


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(REPLIES)), json_values))
def test_any_values_for_answers_give_a_document_that_can_be_sent(values: dict[str, Any]) -> None:
    replies = {name: Reply(value) for name, value in values.items()}
    found = document("/q", replies, replies)
    assert from_plain(unpack(pack(to_plain(found)))) == found
    due(PROBE, replies)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(sorted(REPLIES)), json_values))
def test_asking_comes_to_an_end_whatever_is_answered(values: dict[str, Any]) -> None:
    for table in (PROBE, PROBE_TCG, RUNNING):
        replies: dict[str, Reply] = {}
        for _ in table:
            questions = due(table, replies)
            assert not {question.name for question in questions} & set(replies)
            replies |= {question.name: Reply(values.get(question.name)) for question in questions}
        assert due(table, replies) == []


# -- the document itself ------------------------------------------------------------------------------------------------------


def test_fields_of_a_later_vmloop_are_kept() -> None:
    later = to_plain(WHOLE) | {"quantum": [1, {"x": None}]}
    assert to_plain(from_plain(later)) == later


def test_a_document_of_another_format_is_refused() -> None:
    several: tuple[object, ...] = (
        {},
        [],
        None,
        {"format": FORMAT + 1},
        {"format": True},
        {"format": "1"},
        {"format": 1, "commands": 3},
    )
    for wrong in several:
        with pytest.raises(BadRequest):
            from_plain(wrong)


def test_an_empty_document_of_this_format_is_one() -> None:
    assert from_plain({"format": FORMAT}) == Capabilities()


def test_the_part_about_a_command_is_small_and_has_all_that_it_needs() -> None:
    part = part_about(WHOLE, "blockdev-add")
    assert part.arguments == {"blockdev-add": WHOLE.arguments["blockdev-add"]}
    named = {
        name.removesuffix("?")
        for shape in (*part.arguments.values(), *part.types.values())
        for name in (*shape.members.values(), *shape.variants.values(), *shape.choices)
    }
    assert named & set(WHOLE.types) <= set(part.types)
    assert len(pack(to_plain(part_about(WHOLE, "device_del")))) < 8192
    assert part_about(WHOLE, "nosuch").commands == WHOLE.commands
