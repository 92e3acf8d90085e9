# SPDX-License-Identifier: Apache-2.0
"""Test doubles for whoever writes handlers, or programs that steer VMs: a pytest plugin, and a recorder of monitor dialogues.

docs/testing.md is the guide. Nothing here needs root, QEMU or a network; pytest alone imports `plugin`, and that nothing else until a
fixture is asked for.

Reading order: plugin (the fixtures), private_broker (a broker for one test), double (a simulated VM and its switches), handler_files (what
the VM's worker loads), handler_bench and fake_vm (handlers without any process), record and recording_file (a dialogue with a real monitor
written down), replay (one played again).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .double import Double as Double
    from .double import HandlerFailed as HandlerFailed
    from .double import start_double as start_double
    from .handler_bench import HandlerBench as HandlerBench
    from .private_broker import PrivateBroker as PrivateBroker
    from .replay import Replay as Replay
    from .replay import replaying as replaying

_HOME = {
    "Double": "double",
    "HandlerBench": "handler_bench",
    "HandlerFailed": "double",
    "PrivateBroker": "private_broker",
    "Replay": "replay",
    "replaying": "replay",
    "start_double": "double",
}


def __getattr__(name: str) -> object:
    """Late import: every run of pytest imports this for the plugin, and most need nothing of it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
