# SPDX-License-Identifier: Apache-2.0
"""A definition's arguments against the recorded QEMU: what is surely wrong is found, and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.capabilities import Capabilities
from vmloop.worker.probe.arguments import checkable, wrong_arguments

from ..fakes.recorded_qemu import load

QEMU = load().document()


def wrong(*args: str, of: Capabilities = QEMU) -> list[str]:
    return [str(found) for found in wrong_arguments(of, list(args))]


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["-machine", "q36"], "q35"),
        (["-M", "pc-q35-7.3,accel=tcg"], "pc-q35-7.2"),
        (["-machine", "type=q53"], "q35"),
        (["--machine", "accel=tcg,type=q36"], "q35"),
        (["-device", "virtio-net-pcl,id=n0"], "virtio-net-pci"),
        (["-device", "virtio-nett"], "virtio-net"),
        (["-device", "id=n0,driver=e1001"], "e1000"),
        (["-device", json.dumps({"driver": "nvmee", "id": "x"})], "nvme"),
        (["-cpu", "Skylake-Serverr,+vmx"], "Skylake-Server"),
        (["-accel", "tgc"], "tcg"),
        (["-nodefaults", "-S", "-name", "-x", "disk.img", "--device", "nvmee"], "nvme"),
        (["-machine", "q35,accel=kvmm"], "kvm"),
    ],
)
def test_a_name_that_is_not_there_is_found_with_one_that_is_near(args: list[str], near: str) -> None:
    [text] = wrong(*args)
    assert f"'{near}'" in text
    assert checkable(args)


@pytest.mark.parametrize(
    "args",
    [
        ["-machine", "q35,accel=kvm:tcg", "-m", "512"],
        ["-M", "pc"],
        ["-machine", "accel=tcg"],
        ["-machine", "none"],
        ["-machine", "help"],
        ["-accel", "hvf", "-accel", "tcg"],  # QEMU takes the first that it can
        ["-machine", "accel=xen:tcg"],
        ["-accel", "help"],
        ["-accel", "tcg,thread=multi"],
        ["-device", "virtio-net,netdev=n0"],  # an alias
        ["-device", "virtio-blk-pci,drive=d0"],
        ["-device", "ahci,id=x"],
        ["-device", "help"],
        ["-device", "nosuch,help"],
        ["-device", "?"],
        ["-device", "{not json"],
        ["-device", '{"id": "x"}'],
        ["-device", '{"driver": 3}'],
        ["-cpu", "host,+x"],
        ["-cpu", "max"],
        ["-cpu", "skylake-server"],
        ["-cpu", "qemu64-x86_64-cpu"],
        ["-cpu", "help"],
        ["-readconfig", "/etc/q36.cfg"],
        ["-name", "-device"],
        ["-name", "-device", "nosuch"],  # the VM is called -device, and nosuch is an image
        ["-some-option-of-a-later-qemu", "-device", "nosuch"],
        ["-device"],
        [],
    ],
)
def test_what_qemu_may_well_take_is_let_through(args: list[str]) -> None:
    assert wrong(*args) == []


def test_everything_that_is_wrong_is_told_at_once() -> None:
    assert len(wrong("-machine", "q36", "-device", "nosuch", "-cpu", "386DX", "-accel", "warp")) == 4


def test_where_the_document_says_nothing_nothing_is_wrong() -> None:
    everything = ["-machine", "q36", "-device", "nosuch", "-cpu", "nosuch", "-accel", "warp"]
    assert wrong(*everything, of=Capabilities(target="x86_64")) == []


def test_a_target_whose_models_are_not_all_listed_is_not_checked_for_them() -> None:
    assert wrong("-cpu", "rv64", of=Capabilities(target="riscv64", cpus=["any"])) == []


def test_an_alias_is_known_by_its_type_where_aliases_were_not_told() -> None:
    assert wrong("-device", "virtio-rng", of=Capabilities(device_types=["virtio-rng-ccw"])) == []


def test_arguments_without_a_name_in_them_are_not_worth_a_probe() -> None:
    assert not checkable(["-m", "64", "-display", "none", "-nodefaults"])


@given(st.lists(st.sampled_from(["-device", "-machine", "-cpu", "-accel", "help"]) | st.text(max_size=12), max_size=8))
def test_any_arguments_are_survived(args: list[str]) -> None:
    for found in wrong_arguments(QEMU, args):
        assert len(str(found)) < 1000
