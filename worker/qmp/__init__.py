# SPDX-License-Identifier: Apache-2.0
"""The QMP monitor: framing (bytes to lines, by peeking), ledger (what QEMU owes), session, liveness (busy or frozen)."""
