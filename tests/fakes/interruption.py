# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at a place of one's choice: by line or by instruction, in some files. Used by the tests of the client and of embedded mode."""

from __future__ import annotations

import sys
from collections.abc import Collection
from types import FrameType
from typing import Any, Literal


class Interruption:
    """Raises KeyboardInterrupt before the n-th line or instruction (opcode) that is carried out in these files, n from 1.

    `struck` if there were so many. Finalizers are spared: what they raise goes nowhere.
    """

    def __init__(self, number: int, files: Collection[str], each: Literal["line", "opcode"]) -> None:
        self._left = number
        self._files = files
        self._each = each
        self.struck = False

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        del argument
        if frame.f_code.co_filename not in self._files or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = self._each == "opcode"
        self._left -= event == self._each
        if self._left == 0 and not self.struck:
            self.struck = True
            sys.settrace(None)
            raise KeyboardInterrupt
        return self._trace
