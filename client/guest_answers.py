# SPDX-License-Identifier: Apache-2.0
"""What a guest agent answered, checked before anything is done with it: a guest may lie. Used by guest_exec.py and guest_files.py."""

from __future__ import annotations

import base64
import binascii
from typing import Final, TypeVar

import msgspec

from ..common.errors import AgentError
from ..common.names import VM_SERVICE_PREFIX

Model = TypeVar("Model")

# The `kind` of an `AgentError` for an answer that makes no sense: the worker could not parse it, or it is not what the command should give.
DAMAGED: Final = "damaged"


def vm_of(service: str) -> str:
    """The VM's name, for messages."""
    return service.removeprefix(VM_SERVICE_PREFIX)


def fitting(value: object, model: type[Model], service: str, command: str) -> Model:
    """An answer as a model; `AgentError` if the guest sent something else."""
    try:
        return msgspec.convert(value, model)
    except msgspec.ValidationError as error:
        raise nonsense(service, command, str(error)) from error


def from_base64(text: str, service: str, command: str) -> bytes:
    """The bytes in an answer; `AgentError` if they are none."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise nonsense(service, command, str(error)) from error


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def nonsense(service: str, command: str, why: str) -> AgentError:
    """The error for an answer that no sound agent gives."""
    return AgentError(
        f"the guest agent of {vm_of(service)} gave {command} an answer that makes no sense: {why}", kind=DAMAGED
    )
