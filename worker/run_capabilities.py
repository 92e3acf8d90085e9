# SPDX-License-Identifier: Apache-2.0
"""What the QEMU of one VM's run can do: as it was known when the run began, else as it says itself. Used by handling.py and beginnings.py.

At a start the document of the binary, if one is in the cache, is checked against the definition and kept for the run (a second link to
the same file), so that a QEMU that is upgraded on the disk changes nothing about one that runs. A run without one, an attached one for
instance, is asked on its own monitor, once, when somebody wants to know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ..common.capabilities import Capabilities
from ..common.definition import SIMULATED, Definition
from ..common.durable import write_whole
from ..common.errors import ConfigError, DeadlineExceeded, VmloopError
from .probe.arguments import checkable, wrong_arguments
from .probe.asking import Asking
from .probe.cache import Cache, Cached, encode_document, read_document
from .probe.conversation import ask_running
from .probe.document import document
from .probe.probing import find_binary
from .probe.questions import RUNNING
from .probe.validity import stamp_of

if TYPE_CHECKING:
    from .vm import Vm

log = logging.getLogger(__name__)

# To find out why a QEMU did not start: it takes a quarter of a second; below requests.LAST_ANSWERS_SECONDS, for the run is over by then.
EXPLAIN_SECONDS: Final = 1.5


class RunCapabilities:
    """Of one VM. All on the worker's loop."""

    def __init__(self, vm: Vm, directory: Path | None) -> None:
        """`directory`: of the documents of binaries, state/capabilities."""
        self._vm = vm
        self._cache = Cache(directory)
        self._names: frozenset[str] | None = None  # of the present run: commands, events, features
        self._asking: asyncio.Task[Capabilities] | None = None

    # -- a run begins -------------------------------------------------------------------------------------------------------

    def check(self, definition: Definition) -> Capabilities | None:
        """Before a launch: what is known of the binary, if anything. `ConfigError` if it is known not to have what the definition names.

        No probe is made for it: a start waits for nothing that it can do without.
        """
        found = self._known(definition)
        if found is not None:
            self._refuse(found, definition)
        return found

    def keep(self, found: Capabilities | None) -> None:
        """A run begins: what `check` has found holds for all of it; None for an attached one."""
        self._names = None
        path = self._vm.paths.capabilities
        try:
            path.unlink(missing_ok=True)
            source = self._cache.path_of(found.binary) if found is not None else None
            if source is not None:
                os.link(source, path)
        except (
            OSError
        ) as error:  # of other file systems, and of those without links: the run itself is asked when it matters
            log.info("VM %s: its QEMU's capabilities are not kept: %s", self._vm.name, error)

    async def explain(self, definition: Definition, seconds: float) -> None:
        """A QEMU ended at once: `ConfigError` if a probe of the binary says that the definition was why. Anything else is only logged."""
        if definition.qemu.binary == SIMULATED or not checkable(definition.qemu.args):
            return
        asking = Asking(self._cache)
        try:
            known = await asking.known(definition.qemu.binary, seconds=min(seconds, EXPLAIN_SECONDS))
        except VmloopError as error:
            log.info("VM %s: why it did not start cannot be told by a probe: %s", self._vm.name, error)
            return
        finally:
            await asking.close()
        self._refuse(known.capabilities, definition)

    def _known(self, definition: Definition) -> Capabilities | None:
        """The names in the document of a definition's binary, if one is there that is true now."""
        if definition.qemu.binary == SIMULATED:
            return None
        try:
            return self._cache.read_names(stamp_of(find_binary(definition.qemu.binary)))
        except (VmloopError, OSError):
            return None  # the launch says what is wrong with the binary

    def _refuse(self, found: Capabilities, definition: Definition) -> None:
        wrong = wrong_arguments(found, definition.qemu.args)
        if wrong:
            text = "; ".join(map(str, wrong))
            raise ConfigError(
                f"VM {self._vm.name} was not started: qemu.args: {text} ({found.binary} {_dotted(found)})"
            )

    # -- it is asked for ----------------------------------------------------------------------------------------------------

    async def get(self, seconds: float) -> Capabilities:
        """The document of the run. Raises `NotRunning` without a run, what a QMP command raises, `DeadlineExceeded`."""
        kept = self._kept()
        if kept is not None:
            return kept
        self._vm.require_session()
        if self._asking is None:
            self._asking = self._vm.loop.create_task(self._ask_the_run())
            self._asking.add_done_callback(self._asked)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._asking)
        except TimeoutError:
            text = f"VM {self._vm.name}: its QEMU has not said within {seconds:.3g} s what it can do"
            raise DeadlineExceeded(text) from None

    async def has(self, name: str, seconds: float) -> bool:
        """Whether the run's QEMU has a command, an event or a feature of this name. Raises what `get` raises."""
        if self._names is None:
            found = await self.get(seconds)
            self._names = frozenset((*found.commands, *found.events, *found.features))
        return name in self._names

    def _kept(self) -> Capabilities | None:
        if not self._vm.alive:
            return None
        cached = read_document(self._vm.paths.capabilities)
        return cached.capabilities if cached is not None else None

    async def _ask_the_run(self) -> Capabilities:
        vm = self._vm
        epoch = vm.run.epoch if vm.run is not None else 0

        async def execute(command: str, arguments: dict[str, Any] | None) -> Any:
            return await vm.require_session().execute(command, arguments, seconds=vm.settings.launch)

        replies = await ask_running(RUNNING, execute)
        binary = vm.process.identity.executable if vm.process is not None else ""
        found = document(binary, replies)
        if vm.run is not None and vm.run.epoch == epoch and vm.alive:
            with contextlib.suppress(OSError):  # it is asked again when it is wanted again
                write_whole(vm.paths.capabilities, encode_document(Cached(None, found)))
        return found

    def _asked(self, task: asyncio.Task[Capabilities]) -> None:
        self._asking = None
        if not task.cancelled() and task.exception() is not None:
            log.info("VM %s: its QEMU cannot be asked what it can do: %s", self._vm.name, task.exception())


def _dotted(capabilities: Capabilities) -> str:
    return ".".join(map(str, msgspec.to_builtins(capabilities.version)))
