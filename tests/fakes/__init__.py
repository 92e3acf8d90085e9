# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for QEMU, its agent and the clock, each of which passes the contract of the real thing."""
