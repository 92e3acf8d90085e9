# SPDX-License-Identifier: Apache-2.0
"""Verbs on a VM's files: define undefine. They run in a worker so that a slow disk holds up no one but this VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from ...common.definition import definition_from_mapping, definition_to_toml
from ...common.durable import write_whole
from ...common.errors import AlreadyRunning, BadRequest, ConfigError, Denied
from ..epochs import leave_epoch
from ..runfile import remove_directory
from .request import Request

if TYPE_CHECKING:
    from ..app import App


class DefineArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    definition: dict[str, Any]


class UndefineArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


async def define(app: App, request: Request, arguments: DefineArguments) -> dict[str, Any]:
    """Check a definition and write it down; a running VM takes it up at its next start."""
    del request
    definition = definition_from_mapping(arguments.definition, f"definition of {app.name}")
    if definition.name != app.name:
        raise BadRequest(f"the definition names {definition.name!r}, the request {app.name!r}")
    try:
        write_whole(app.paths.definition, definition_to_toml(definition))
    except OSError as error:
        raise ConfigError(
            f"VM {app.name} is not defined: {error.filename} cannot be written: {error.strerror}"
        ) from error
    app.definition = msgspec.to_builtins(definition)
    app.send_status()
    return {"name": app.name}


async def undefine(app: App, request: Request, arguments: UndefineArguments) -> dict[str, Any]:
    """Forget a VM that does not run: its definition, its last run, its logs."""
    del request, arguments
    if app.vm.alive:
        raise AlreadyRunning(f"VM {app.name} is {app.vm.state.state.value}; stop or detach it first")
    leave_epoch(app.paths, app.vm.run, app.vm.events.newest_epoch)  # tried again when the directory has made room
    try:
        remove_directory(app.paths.state)
    except OSError as error:
        raise Denied(
            f"VM {app.name}: {error.filename} cannot be removed: {error.strerror}; remove it by hand"
        ) from error
    app.forget = True
    app.send_status()
    app.vm.gone.set()
    return {"name": app.name}
