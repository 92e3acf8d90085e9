# SPDX-License-Identifier: Apache-2.0
"""The tests' own Linux guest: Debian's cloud kernel, busybox and the real qemu-ga, up in about two seconds under TCG.

Reading order: image.py (what tests and benchmarks call), build.py (packs the initramfs), and what is packed as it is: init (process 1),
shutdown (what qemu-ga calls), trouble (a guest that misbehaves on demand, through guest-exec).
"""
