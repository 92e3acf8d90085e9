# SPDX-License-Identifier: Apache-2.0
"""VM names, service names and event topics: the spellings that cross a wire.

Broker, workers and clients all check names here, so that nothing that is not a plain name ever becomes a path.
"""

from __future__ import annotations

import re
from typing import Final, NewType

from .errors import BadRequest

VmName = NewType("VmName", str)

HOST_SERVICE: Final = "vmloop"
VM_SERVICE_PREFIX: Final = "vm/"
PROBER_SERVICE_PREFIX: Final = "probe/"
PROBER_PREFIX: Final = "@"  # no VM's name begins so

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


def vm_name(text: object) -> VmName:
    """The checked name; `BadRequest` unless it is 1 to 64 of `a-z A-Z 0-9 . _ -` and starts with a letter or digit."""
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise BadRequest(
            f"{text!r:.100} is no VM name: use 1 to 64 of a-z A-Z 0-9 . _ - and start with a letter or a digit"
        )
    return VmName(text)


def vm_service(name: VmName) -> str:
    """The service that stands for one VM: `vm/NAME`."""
    return VM_SERVICE_PREFIX + name


def vm_of_service(service: str) -> VmName:
    """The VM of a service `vm/NAME`; `BadRequest` for any other service."""
    if not service.startswith(VM_SERVICE_PREFIX):
        raise BadRequest(f"unknown service {service!r:.100}: there is 'vmloop' (the host) and 'vm/NAME'")
    return vm_name(service[len(VM_SERVICE_PREFIX) :])


def is_prober(name: str) -> bool:
    """Whether a worker of this name is a prober (worker/probe/prober.py), and no VM's."""
    return name.startswith(PROBER_PREFIX)


def vm_topic(name: VmName, event: str = "") -> bytes:
    """The PUB topic of a VM's event, or with no event the prefix of all of its events."""
    return f"vm/{name}/{event}".encode()


def host_topic(event: str = "") -> bytes:
    """The PUB topic of an event of the host."""
    return f"host/{event}".encode()
