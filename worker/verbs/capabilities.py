# SPDX-License-Identifier: Apache-2.0
"""The verb `capabilities`: what this VM's QEMU can do. docs/capabilities.md is the result's reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from ...common.capabilities import part_about, to_plain
from .request import Request

if TYPE_CHECKING:
    from ..app import App


class CapabilitiesArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None


async def capabilities(app: App, request: Request, arguments: CapabilitiesArguments) -> dict[str, Any]:
    """The document of the present run; with `command` the part that is needed to check that one."""
    found = await app.handling.capabilities.get(request.deadline - app.loop.time())
    return to_plain(found if arguments.command is None else part_about(found, arguments.command))
