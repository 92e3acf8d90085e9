# SPDX-License-Identifier: Apache-2.0
"""Tests: unit (one module each, no process), contract (fakes and the real thing alike), system (whole), fakes, data, bench, fuzz."""
