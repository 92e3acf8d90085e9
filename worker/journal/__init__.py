# SPDX-License-Identifier: Apache-2.0
"""The journal: a VM's events on disk, in `state/vms/NAME/journal/`. Written and read by the VM's worker alone.

Reading order: frames (length and checksum around any bytes), record (one event as a frame), segments (the files, and what is done about
damaged ones), journal (append and read), store (the journal, and memory while the disk refuses: what worker/events.py uses).
"""
