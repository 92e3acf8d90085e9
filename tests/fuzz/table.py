# SPDX-License-Identifier: Apache-2.0
"""Every target, with the modules whose parsing it covers; and the modules that decode something and have no target, with the reason.

tests/unit/test_fuzz.py compares both with the source: a module that decodes must stand in one of the two. To add a target: a function from
bytes to nothing and one that gives its seeds, in the module of its family, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from . import (
    broker_targets,
    client_targets,
    file_targets,
    import_targets,
    journal_targets,
    probe_targets,
    recording_targets,
    wire_targets,
    worker_targets,
)


class Target(NamedTuple):
    """`run` raises when a promise is broken; `seeds` are messages as they are, and what has broken a promise before."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    covers: tuple[str, ...]
    max_bytes: int = 4096  # of an input that a fuzzer makes; seeds may be longer


_ROWS: Final = (
    Target("frame", wire_targets.frame, wire_targets.frames, ("common/wire.py",)),
    Target("body", wire_targets.body, wire_targets.bodies, ("common/pack.py", "common/errors.py")),
    Target("spelling", wire_targets.spelling, wire_targets.spellings, ("common/names.py", "common/cursor.py"), 128),
    Target("majordomo", wire_targets.majordomo, wire_targets.majordomo_requests, ("common/majordomo.py",)),
    Target("zygote-packet", wire_targets.zygote_packet, wire_targets.zygote_packets, ("common/zygote_wire.py",)),
    Target(
        "definition", file_targets.definition, file_targets.definitions, ("common/definition.py", "common/config.py")
    ),
    Target("settings", file_targets.settings, file_targets.settings_texts, ("common/settings.py", "common/config.py")),
    Target("run-file", file_targets.run_file, file_targets.run_files, ("worker/runfile.py", "broker/catalogue.py")),
    Target("pending", file_targets.pending_file, file_targets.pending_files, ("worker/handlers/pending.py",)),
    Target(
        "quarantine", file_targets.quarantine_file, file_targets.quarantine_files, ("worker/handlers/quarantine.py",)
    ),
    Target(
        "page",
        file_targets.page,
        file_targets.pages,
        ("common/page.py", "worker/qmp/ledger.py", "worker/agent/ledger.py"),
        4096,
    ),
    Target(
        "journal",
        journal_targets.journal,
        journal_targets.segments,
        (
            "worker/journal/frames.py",
            "worker/journal/record.py",
            "worker/journal/segments.py",
            "worker/journal/journal.py",
            "worker/journal/store.py",
        ),
    ),
    Target("answers-file", journal_targets.answers, journal_targets.answer_files, ("worker/answers.py",)),
    Target("probe-dialogue", probe_targets.dialogue, probe_targets.dialogues, ("worker/probe/conversation.py",)),
    Target(
        "probe-answers",
        probe_targets.answers,
        probe_targets.answer_maps,
        (
            "worker/probe/schema.py",
            "worker/probe/document.py",
            "worker/probe/questions.py",
            "worker/probe/arguments.py",
            "client/command_check.py",
        ),
    ),
    Target(
        "capabilities",
        probe_targets.kept,
        probe_targets.kept_files,
        ("common/capabilities.py", "worker/probe/cache.py"),
    ),
    Target("doors", broker_targets.doors, broker_targets.messages, ("broker/core.py", "broker/host.py")),
    Target("answers", client_targets.answers, client_targets.answer_scripts, ("client/calls.py",)),
    Target("stream", client_targets.stream, client_targets.stream_scripts, ("client/stream.py",)),
    Target(
        "results",
        client_targets.results,
        client_targets.result_bodies,
        ("client/results.py", "client/guest_answers.py"),
    ),
    Target("words", client_targets.words, client_targets.command_lines, ("client/cli/monitor.py",)),
    Target(
        "domain-xml",
        import_targets.domain_xml,
        import_targets.domains,
        (
            "client/libvirt/domain_xml.py",
            "client/libvirt/importing.py",
            "client/libvirt/interfaces.py",
            "client/libvirt/inventory.py",
            "client/libvirt/preparation.py",
        ),
    ),
    Target(
        "libvirt-answer",
        import_targets.libvirt_answer,
        import_targets.libvirt_answers,
        (
            "client/libvirt/argv.py",
            "client/libvirt/devices_of_libvirt.py",
            "client/libvirt/document.py",
            "client/libvirt/host_paths.py",
            "client/libvirt/takeover.py",
        ),
    ),
    Target("monitor", worker_targets.monitor, worker_targets.monitor_scripts, ("worker/qmp/session.py",)),
    Target("monitor-bytes", worker_targets.monitor_bytes, worker_targets.monitor_chunks, ("worker/qmp/framing.py",)),
    Target(
        "said-by-qemu",
        worker_targets.said_by_qemu,
        worker_targets.json_values,
        (
            "worker/qmp/commands.py",
            "worker/events.py",
            "worker/changes.py",
            "worker/handlers/fields.py",
            "worker/transitions.py",
        ),
    ),
    Target(
        "agent", worker_targets.agent, worker_targets.agent_scripts, ("worker/agent/lines.py", "worker/agent/sync.py")
    ),
    Target("arguments", worker_targets.arguments, worker_targets.argument_bodies, ("worker/verbs/request.py",)),
    Target(
        "output",
        worker_targets.output,
        worker_targets.outputs,
        ("worker/handlers/report.py", "worker/handlers/naming.py"),
    ),
    Target("simulated", worker_targets.simulated, worker_targets.simulated_inputs, ("worker/qemu/simulated_json.py",)),
    Target(
        "recording",
        recording_targets.recording,
        recording_targets.recordings,
        ("worker/qemu/recording.py", "worker/qemu/simulated_script.py"),
    ),
    Target("recorder", recording_targets.recorder, recording_targets.dialogues, ("testing/recording_file.py",)),
)

TARGETS: Final = {target.name: target for target in _ROWS}

_STAND_IN: Final = "a part of the simulated VM: its files, guest and switches are the test's own; what comes over a socket is `simulated`"
_REPLACES: Final = "makes text of bytes with an error handler that takes all of them; nothing is parsed"

NO_TARGET: Final = {
    "broker/__main__.py": _REPLACES,
    "broker/autostart.py": "a worker's answer to the broker's own request: pack's `unpack` (`body`), of which a text is taken",
    "broker/probes.py": "a prober's greeting: pack's `unpack_map` (`body`), of which two whole numbers are taken",
    "broker/zygote_process.py": "the kernel's answer to SO_PEERCRED",
    "broker/zygote.py": "the spec in a Fork, which only a broker of the same user sends: refused as its packet is (`zygote-packet`)",
    "common/ownership.py": "between a broker and the process that started it, over what nobody else has; see tests/unit/test_ownership.py",
    "client/cli/agent.py": _REPLACES,
    "client/cli/base.py": "click's own conversion of a word of the command line, which takes text",
    "client/cli/cp.py": _REPLACES + "; a checksum is taken by a pattern of 64 hexadecimal digits",
    "client/cli/import_domain.py": "makes text of the file that it has just written (`domain-xml`)",
    "client/cli/main.py": _REPLACES,
    "client/cli/output.py": _REPLACES,
    "client/libvirt/virsh.py": "what virsh prints: UTF-8 or refused; then argv's own (`libvirt-answer`)",
    "client/embedding.py": _REPLACES + "; the private broker's report is pack's `unpack_map` (`body`)",
    "client/lane.py": "the number of an event of libzmq's own socket monitor, from the same process",
    "testing/double.py": "the faults of the stand-in that it has started itself; what is none is a fault still there",
    "testing/private_broker.py": _REPLACES,
    "worker/app.py": "a frame from the broker: wire's own `decode` (`frame`), then the operation's arguments (`arguments`)",
    "worker/handlers/view.py": "unpacks what it has just packed itself, to give each handler a copy",
    "worker/probe/prober.py": "a frame from the broker: wire's own `decode` (`frame`), then a map that the broker has checked",
    "worker/probe/throwaway.py": _REPLACES,
    "worker/probe/validity.py": _REPLACES,
    "worker/qemu/launch.py": _REPLACES,
    "worker/qemu/process.py": "the kernel's answer to SO_PEERCRED",
    "worker/qemu/simulated.py": _STAND_IN,
    "worker/qemu/simulated_control.py": _STAND_IN,
    "worker/qemu/simulated_faults.py": _STAND_IN,
    "worker/qemu/simulated_guest.py": _STAND_IN,
    "worker/stack.py": _REPLACES,
}
