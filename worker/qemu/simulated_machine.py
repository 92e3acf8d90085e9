# SPDX-License-Identifier: Apache-2.0
"""Commands of a simulated monitor about the machine: actions, memory, dumps, jobs, and devices that it has not.

Rows of the table in simulated_commands. Replies and texts are those of a QEMU 7.2 without the device in question.
"""

from __future__ import annotations

from typing import Any, Final, get_args, get_type_hints

import msgspec

from .simulated_dump import AVAILABLE, FORMATS
from .simulated_requests import Argument, Refused
from .simulated_table import Command, Monitor
from .simulated_vm import Actions


def _set_action(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    monitor.vm.actions = msgspec.structs.replace(monitor.vm.actions, **arguments)
    return {}


def _watchdog_set_action(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    return _set_action(monitor, {"watchdog": arguments["action"]})


def _system_wakeup(monitor: Monitor, _: dict[str, Any]) -> Any:
    if not monitor.vm.wakeup():
        raise Refused("Unable to wake up: guest is not in suspended state")
    return {}


def _current_machine(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"wakeup-suspend-support": True}


# -- memory --


def _memory_size(monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"base-memory": monitor.vm.memory, "plugged-memory": 0}


def _no_balloon(_monitor: Monitor, _: dict[str, Any]) -> Any:
    raise Refused("No balloon device has been activated", "DeviceNotActive")


def _dump_guest_memory(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    return monitor.dump.start(arguments)


def _query_dump(monitor: Monitor, _: dict[str, Any]) -> Any:
    return monitor.dump.query()


def _dump_capability(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return {"formats": list(AVAILABLE)}


# -- devices and jobs --


def _rx_filter(_monitor: Monitor, arguments: dict[str, Any]) -> Any:
    if "name" in arguments:
        raise Refused(f"invalid net client name: {arguments['name']}")
    return []


def _query_jobs(monitor: Monitor, _: dict[str, Any]) -> Any:
    return monitor.jobs.jobs


def _query_block_jobs(monitor: Monitor, _: dict[str, Any]) -> Any:
    return monitor.jobs.block_jobs


def _empty_list(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return []


def _empty_object(_monitor: Monitor, _: dict[str, Any]) -> Any:
    return {}


_CHOICES: Final = {name: get_args(hint) for name, hint in get_type_hints(Actions).items()}

COMMANDS: Final[dict[str, Command]] = {
    "set-action": Command(
        _set_action, tuple(Argument(name, "string", True, values) for name, values in _CHOICES.items())
    ),
    "watchdog-set-action": Command(_watchdog_set_action, (Argument("action", "string", False, _CHOICES["watchdog"]),)),
    "system_wakeup": Command(_system_wakeup),
    "query-current-machine": Command(_current_machine),
    "query-memory-size-summary": Command(_memory_size),
    "query-memory-devices": Command(_empty_list),
    "query-balloon": Command(_no_balloon),
    "balloon": Command(_no_balloon, (Argument("value", "integer"),)),
    "dump-guest-memory": Command(
        _dump_guest_memory,
        (
            Argument("paging", "boolean"),
            Argument("protocol"),
            Argument("detach", "boolean", True),
            Argument("begin", "integer", True),
            Argument("length", "integer", True),
            Argument("format", "string", True, FORMATS),
        ),
    ),
    "query-dump": Command(_query_dump),
    "query-dump-guest-memory-capability": Command(_dump_capability),
    "query-rx-filter": Command(_rx_filter, (Argument("name", "string", True),)),
    "query-pr-managers": Command(_empty_list),
    "query-named-block-nodes": Command(_empty_list, (Argument("flat", "boolean", True),)),
    "query-iothreads": Command(_empty_list),
    "query-migrate": Command(_empty_object),
    "query-jobs": Command(_query_jobs),
    "query-block-jobs": Command(_query_block_jobs),
}
