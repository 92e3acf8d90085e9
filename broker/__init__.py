# SPDX-License-Identifier: Apache-2.0
"""The dispatcher, one per host: __main__ → loop → core. Also the zygote, a process of its own that forks the workers.

Reading order: loop (the only part that waits), core (decides), crew (workers come and go), inflight and roster (tables), spawner, zygote;
probes (what QEMU binaries can do).
"""
