# SPDX-License-Identifier: Apache-2.0
"""The guest agent of one VM. Everything that comes from the guest is hostile until checked.

Read in this order: lines (bytes to lines, and what reading may cost), sync (what is said, and whose a reply is), commands (one on its
way, and its errors), ledger (what is owed, on the page), reading and intake (nothing is lost with the worker that read it), writer,
standing (what is known over all connections), session (one open connection: a queue, one command on the wire), chardev (whether the guest
has the port open), endings (commands that end the guest), freeze (no file system stays frozen for ever), agent (the whole; what vm.py
holds).
"""
