# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: whatever bytes a client, worker, guest, QEMU or old file holds, a parser of vmloop raises its documented errors and no other.

A target is a function from bytes to nothing that raises AssertionError, or anything at all, when a promise is broken. Each family has its
module here (`*_targets.py`), table.py lists all of them with the modules they cover, and which module that decodes has none and why.
`make fuzz` runs them (runner.py): with atheris where it is installed, else by hypothesis; tests/unit/test_fuzz.py runs each for a moment.
An input that broke something stays as a seed, written by code, or in tests/data/fuzz/TARGET/ if it is best kept as it was found.
"""
