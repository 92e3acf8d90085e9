# SPDX-License-Identifier: Apache-2.0
"""Workers that were asked for and have not been made: which the zygote knows of, and by when it must say something. For spawner.py."""

from __future__ import annotations

from collections.abc import Callable

from ..common.names import VmName


class Forks:
    """In the order they were asked for. A zygote makes them one by one, so it is its silence that is timed, and no single fork."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        """`seconds`: for how long a zygote that has been told of forks may say nothing."""
        self.due: float | None = None  # when it must have said something; None: it has been told of none
        self._seconds = seconds
        self._clock = clock
        self._told: dict[VmName, bool] = {}  # asked for → whether the zygote knows

    def __bool__(self) -> bool:
        return bool(self._told)

    def ask(self, name: VmName) -> None:
        self._told.setdefault(name, False)

    def tell(self, *, again: bool = False) -> list[VmName]:
        """Those that the zygote is to be told of now; `again`: also what it was told of before."""
        names = [name for name, told in self._told.items() if again or not told]
        for name in names:
            self._told[name] = True
        if names:
            self.due = self._clock() + self._seconds
        return names

    def answered(self, name: VmName) -> None:
        """It has been made, or cannot be."""
        self._told.pop(name, None)

    def heard(self) -> None:
        """The zygote has said something, whatever it was: it gets on."""
        self.due = self._clock() + self._seconds if any(self._told.values()) else None

    def forget_told(self) -> None:
        """There is another zygote, or none: all are asked anew."""
        self._told = dict.fromkeys(self._told, False)
        self.due = None
