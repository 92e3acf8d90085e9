# SPDX-License-Identifier: Apache-2.0
"""QEMU as a process: launch (a new one), adopt (one that runs), process (identity and signals), simulated."""
