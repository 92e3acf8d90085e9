# SPDX-License-Identifier: Apache-2.0
"""From QEMU's arguments as libvirt makes them to those of a definition. Pure; used by importing.py.

Each step goes over all options once and gives those that stay. The ids of what was taken out are kept, so that what hangs on it goes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from .argv import CommandLine, Option, Properties, options_of, properties_of
from .devices_of_libvirt import (
    in_libvirts_place,
    is_agent_port,
    is_master_key,
    is_memory_directory,
    memory_directory,
    monitor_ids,
    secret_id,
    without_fds,
)
from .notes import Note, changed, left_out, warning
from .preparation import Prepared
from .usb_devices import with_ids

# Where libvirt's system daemon keeps the variables of a guest's firmware, unless the domain says otherwise.
NVRAM_DIRECTORY: Final = "/var/lib/libvirt/qemu/nvram"

_VARIABLES: Final = re.compile(r"_VARS\.[a-z0-9]+\Z")  # .fd, .qcow2, .raw: how libvirt names such a file

_DROPPED: Final = {
    "-S": "vmloop starts QEMU stopped by itself, and lets it go on when its monitor is ready",
    "-no-shutdown": "[handlers] on_poweroff says what happens when the guest powers off",
    "-daemonize": "the VM's worker starts QEMU and watches it",
    "-pidfile": "vmloop knows its QEMU by pid, start time and executable",
    "-msg": "libvirt's wish for its own log",
    "-add-fd": "a file descriptor that libvirt had opened",
    "-incoming": "of a migration or of a saved state; vmloop starts the guest anew",
    "-loadvm": "of a snapshot; vmloop starts the guest anew",
}
_ON_TERMINAL: Final = ("-qmp", "-qmp-pretty", "-monitor", "-serial")
_REFERENCES: Final = (
    "chardev",
    "tpmdev",
    "fsdev",
)  # keys that name another option's id, without which the device is none
_FIRST_CID: Final = 3  # 0 to 2 are the host's
_MOVED: Final = "it was in a directory of libvirt's: QEMU listens on {} in the VM's own (state/vms/NAME)"


class Takeover:
    """One command line on its way."""

    def __init__(
        self, line: CommandLine, prepared: Prepared, name: str, own_directory: str = "", huge_pages: str = ""
    ) -> None:
        """`own_directory`: libvirt's root for this import, if it had one. `huge_pages`: where the guest's memory is to be, if in those."""
        self.notes: list[Note] = []
        self.agent = False
        self._line = line
        self._options = line.options
        self._usb = prepared.usb
        self._cards = {card.placeholder: card for card in prepared.cards}
        self._huge_pages = huge_pages
        self._name = name
        self._own_directory = own_directory
        self._theirs: Callable[[str], bool] = in_libvirts_place(own_directory)
        self._gone: set[str] = set()

    def run(self) -> list[Option]:
        """The options of the definition; `notes` and `agent` are set then."""
        self._drop_flags()
        self._drop_monitor_and_secrets()
        self._drop_agent_port()
        self._move_sockets()
        self._drop_dependents()
        self._drop_fds()
        self._put_cards()
        self._options = [
            with_ids(each, properties, self._usb) if each.name == "-device" else each
            for each, properties in self._with_properties("-device")
        ]
        self._move_files()
        self._choose_cid()
        self._open_sandbox()
        self._tell_what_is_left()
        return self._options

    # -- steps ----------------------------------------------------------------------------------------------------------

    def _drop_flags(self) -> None:
        if self._line.environment:
            names = ", ".join(self._line.environment)
            self.notes.append(left_out(f"environment ({names[:200]})", "QEMU gets the environment of its worker"))
        kept = []
        for option in self._options:
            if option.name in _DROPPED:
                self.notes.append(left_out(" ".join(option.words())[:120], _DROPPED[option.name]))
            elif option.name == "-nographic":
                self.notes.append(changed("-nographic", "it would take the terminal: -display none"))
                kept += options_of(["-display", "none"])
            elif option.name in _ON_TERMINAL and (option.value or "").split(",")[0] in ("stdio", "mon:stdio"):
                self.notes.append(left_out(f"{option.name} {option.value}", "QEMU runs without a terminal"))
            else:
                kept.append(option)
        self._options = kept

    def _drop_monitor_and_secrets(self) -> None:
        monitors = monitor_ids(self._options, self._theirs)
        kept = []
        for option, properties in self._with_properties("-object", "-chardev", "-mon"):
            if option.name == "-mon" and properties.text("chardev") in monitors:
                self.notes.append(left_out("-mon of libvirt", "vmloop adds a monitor of its own"))
            elif option.name == "-chardev" and properties.text("id") in monitors:
                pass  # told with its -mon
            elif is_master_key(option, properties, self._theirs):
                self.notes.append(
                    left_out(f"-object secret {properties.text('id')}", "the key of libvirt's own secrets")
                )
            elif name := secret_id(option, properties):
                why = f"sealed with libvirt's key. QEMU will not start without it: -object secret,id={name},file=FILE"
                self.notes.append(left_out(f"-object secret {name}", why))
            else:
                kept.append(option)
        self._options = kept

    def _drop_agent_port(self) -> None:
        ports = {
            properties.text("chardev")
            for option, properties in self._with_properties("-device")
            if is_agent_port(option, properties)
        }
        if not ports:
            return
        self.agent = True
        self.notes.append(changed("channel of the guest agent", "[agent] enabled = true adds vmloop's own port for it"))
        self._options = [
            option
            for option, properties in self._with_properties("-device", "-chardev")
            if not is_agent_port(option, properties)
            and not (option.name == "-chardev" and properties.text("id") in ports)
        ]

    def _move_sockets(self) -> None:
        """Sockets in libvirt's directories: one that QEMU listens on moves to the VM's directory, one of a helper goes."""
        kept = []
        for option, properties in self._with_properties("-chardev", "-vnc", "-spice"):
            path = properties.text("path")
            if screen := self._screen_moved(option, properties):
                kept.append(screen)
                continue
            if properties.text("backend") != "socket" or not self._theirs(path):
                kept.append(option)  # a file, a pipe or a device is where the domain has it
            elif properties.text("server") in ("on", "yes") or "server" in properties.values:
                file = path.rpartition("/")[2] or properties.text("id")
                self.notes.append(changed(f"socket {file[:64]}", _MOVED.format(file)))
                kept.append(Option(option.name, properties.replaced(path=file).render()))
            else:
                self._gone.add(properties.text("id"))
                why = f"a program that libvirt started listens on {path[:120]}: start it yourself, and add the device"
                self.notes.append(left_out(f"-chardev {properties.text('id')}", why))
        self._options = kept

    def _screen_moved(self, option: Option, properties: Properties) -> Option | None:
        """A screen that was shown on a socket in a directory of libvirt's; None for any other argument."""
        key, prefix = {"-vnc": ("vnc", "unix:"), "-spice": ("addr", "")}.get(option.name, ("", ""))
        given = properties.text(key)
        path = given.removeprefix(prefix)
        if not given.startswith(prefix) or not self._theirs(path):
            return None
        file = path.rpartition("/")[2]
        self.notes.append(changed(f"socket {file[:64]}", _MOVED.format(file)))
        return Option(option.name, properties.replaced(**{key: prefix + file}).render())

    def _drop_dependents(self) -> None:
        """What cannot be without something that is gone; in the order of the arguments a thing comes after what it needs."""
        kept = []
        for option, properties in self._with_properties("-chardev", "-tpmdev", "-fsdev", "-device", "-mon"):
            needed = {properties.text(key) for key in _REFERENCES} & self._gone
            if needed and option.name != "-chardev":
                self._gone.add(properties.text("id"))
                driver = properties.text("driver") or properties.text("type")
                self.notes.append(
                    left_out(f"{option.name} {driver} {properties.text('id')}".strip(), f"needs {min(needed)}")
                )
            else:
                kept.append(option)
        self._options = kept

    def _drop_fds(self) -> None:
        unplugged: set[str] = set()
        kept = []
        for option, properties in self._with_properties("-device", "-netdev", "-chardev", "-tpmdev"):
            mine, fds = without_fds(properties)
            if option.name == "-netdev" and fds:
                unplugged.add(properties.text("id"))
                why = "libvirt opened it and passed it on as an fd: the card has no cable, add a -netdev of this id and netdev= to the card"
                self.notes.append(left_out(f"-netdev {properties.text('id')}", why))
            elif fds:
                what = f"{option.name} {properties.text('id') or properties.text('driver')}: {', '.join(fds)}"
                self.notes.append(
                    changed(
                        what, "a file descriptor of libvirt's; QEMU opens what it needs itself, and must be allowed to"
                    )
                )
                kept.append(Option(option.name, mine.render()))
            else:
                kept.append(option)
        self._options = [self._unplug(option, unplugged) if option.name == "-device" else option for option in kept]

    def _unplug(self, option: Option, netdevs: set[str]) -> Option:
        if not netdevs:
            return option
        properties = properties_of(option)
        if properties.text("netdev") not in netdevs:
            return option
        return Option(option.name, properties.without("netdev").render())

    def _put_cards(self) -> None:
        """A card for each placeholder; its source of random numbers goes."""
        if not self._cards:
            return
        kept: list[Option] = []
        missing = {name: card for name, card in self._cards.items() if card.has_slot}
        for option, properties in self._with_properties("-device", "-object"):
            name = properties.text("id")
            if option.name == "-device" and name in missing:
                kept += missing.pop(name).options(properties)
            elif option.name != "-object" or name.removeprefix("obj") not in self._cards:
                kept.append(option)
        for card in self._cards.values():
            if not card.has_slot:
                kept += card.options(Properties({}, is_json=True))
        self._options = kept
        for card in missing.values():
            self.notes.append(left_out(f"network card {card.number}", "libvirt's arguments have no place for it"))

    def _move_files(self) -> None:
        kept = []
        for option, properties in self._with_properties("-object", "-blockdev", "-drive"):
            memory = properties.text("mem-path")
            image = properties.text("filename") or (properties.text("file") if option.name == "-drive" else "")
            if memory and is_memory_directory(memory, self._theirs):
                place = self._huge_pages or memory_directory(memory, self._theirs)
                where = "the VM's own directory" if place == "." else place
                self.notes.append(
                    changed(
                        f"-object {properties.text('id')}", f"guest memory in {where}, not in a directory of libvirt's"
                    )
                )
                at_once = {"prealloc": True if properties.is_json else "on"} if self._huge_pages else {}
                kept.append(Option(option.name, properties.replaced(mem_path=place, **at_once).render()))
            elif (variables := _VARIABLES.search(image)) and self._theirs(image):
                path = f"{NVRAM_DIRECTORY}/{self._name}{variables[0]}"
                self.notes.append(
                    changed(
                        "os nvram",
                        f"the firmware's variables are {path}: copy there libvirt's, or the firmware's template",
                    )
                )
                key = "filename" if option.name == "-blockdev" else "file"
                kept.append(Option(option.name, properties.replaced(**{key: path}).render()))
            else:
                kept.append(option)
        self._options = kept

    def _choose_cid(self) -> None:
        """libvirt gives a vsock that has none a number at each start; in the arguments it has 0, with which QEMU does not start."""
        kept = []
        for option, properties in self._with_properties("-device"):
            if properties.text("driver").startswith("vhost-vsock") and properties.values.get("guest-cid") in (0, "0"):
                why = f"libvirt chose a free one at each start: guest-cid={_FIRST_CID}, change it for a second VM"
                self.notes.append(changed(f"-device {properties.text('id')} cid", why))
                option = Option(option.name, properties.replaced(guest_cid=_FIRST_CID).render())
            kept.append(option)
        self._options = kept

    def _open_sandbox(self) -> None:
        """libvirt's sandbox forbids QEMU to start programs; libvirt starts the bridge helper itself, under vmloop QEMU does."""
        if not any(card.starts_helper for card in self._cards.values()):
            return
        kept = []
        for option, properties in self._with_properties("-sandbox"):
            if option.name == "-sandbox" and {"spawn", "elevateprivileges"} & set(properties.values):
                self.notes.append(
                    changed(
                        "-sandbox",
                        "without spawn=deny and elevateprivileges=deny: QEMU starts a program for a network card",
                    )
                )
                kept.append(Option(option.name, properties.without("spawn", "elevateprivileges").render()))
            else:
                kept.append(option)
        self._options = kept

    def _tell_what_is_left(self) -> None:
        for option in self._options:
            if self._own_directory and self._own_directory in (option.value or ""):
                self.notes.append(
                    warning(" ".join(option.words())[:160], "names a directory that is gone: name another")
                )

    # -- what they use --------------------------------------------------------------------------------------------------

    def _with_properties(self, *names: str) -> list[tuple[Option, Properties]]:
        """Every option, with its properties if it is of one of these names; else with none."""
        return [(option, properties_of(option) if option.name in names else Properties({})) for option in self._options]
