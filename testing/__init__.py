# SPDX-License-Identifier: Apache-2.0
"""Test doubles for whoever writes handlers, or programs that steer VMs: a pytest plugin, and a recorder of monitor dialogues.

docs/testing.md is the guide. Nothing here needs root, QEMU or a network; pytest alone imports `plugin`, and that nothing else until a
fixture is asked for.

Reading order: plugin (the fixtures), private_broker (a broker for one test), double (a simulated VM and its switches), handler_files (what
the VM's worker loads), handler_bench and fake_vm (handlers without any process), record and recording_file (a dialogue with a real monitor
written down), replay (one played again).
"""
