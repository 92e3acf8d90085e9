# SPDX-License-Identifier: Apache-2.0
"""One process per VM: everything that touches that VM happens here.

Reading order: entry (what the zygote runs), app (start, run, stop), loop and link, vm, transitions and order, then qmp/, qemu/ and verbs/.
What a QEMU can do: probe/ and run_capabilities.
"""
