# SPDX-License-Identifier: Apache-2.0
"""The chaos test: many VMs, commands and events, while processes die and stop; at the end what was said is held against what was.

Beside the system tests because it runs the same real broker through the same Site. `make chaos` runs it for ten minutes, test_chaos.py for
some seconds. In reading order:

    recording     what is written down during a run: plain values
    plan          the faults of a seed: pure, the same seed gives the same plan
    storm         one run: start, run, settle, stop
    cast          the VMs of a run, real, launched and attached
    faults        carries the plan out
    commands      clients that send commands, and which answer each got;  raw: one that speaks the bare wire;  power: start, stop, kill
    followers     readers of event streams, each with a habit of its own
    truth         what the kernel and the VMs themselves say;  witness: the same for a real QEMU, over a monitor of its own
    claims        what `list` says, asked all the time
    excuses       which fault excuses which answer
    verdict       what was recorded → what is wrong: pure;  its rules: answers, streams, liveness
    report        the figures
"""
