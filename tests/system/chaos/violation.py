# SPDX-License-Identifier: Apache-2.0
"""What the verdict finds: one broken promise, with what a reader needs to look for its cause. Made by the rules."""

from __future__ import annotations

import msgspec


class Violation(msgspec.Struct, frozen=True):
    """`rule`: few fixed words, to count by; `vm`: empty if it is about no single one; `text`: what exactly."""

    rule: str
    vm: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {f'{self.vm}: ' if self.vm else ''}{self.text}"
