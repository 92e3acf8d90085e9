# SPDX-License-Identifier: Apache-2.0
"""The broker's hold on processes: the zygote, and the pidfds of all workers. Driven by loop.py; never waits.

A zygote that runs (an earlier broker's) is used if it is of this version; else, and when a fresh one is asked for, another one takes its
place (handover.py). One that does not answer in time is ended and replaced. Worker pidfds come from the zygote with the news of the fork,
or are opened here for workers that outlived an earlier broker.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable
from typing import Final

from .. import __version__
from ..common.names import VmName
from ..common.paths import Paths
from ..common.settings import Settings
from ..common.zygote_wire import Dropped, Exited, Forked, Hello, Keep, Kept, NotForked, Packet, Quit, Retire, Tell, Told
from .fd_store import FdStore, Offer, Stored
from .forks import Forks
from .handover import Handover, pass_on
from .packets import PacketEnd, PacketPoll, is_readable
from .pidfds import Pidfds
from .zygote_process import Former, connect, fork_packet, kill_zygote, let_go, start_zygote

log = logging.getLogger(__name__)

# Whatever a zygote is asked it does within milliseconds; one that has not answered by then is stopped, or hangs, and is replaced.
ANSWER_SECONDS: Final = 5.0
# A zygote imports the worker's code first; on a host with much else to do that may take seconds.
START_SECONDS: Final = 15.0


class Spawner:
    """Forks through the zygote, and tells of exits. Everything it waits for is in one epoll, `fileno`, or in `next_due`."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        on_forked: Callable[[VmName, int], None],
        on_not_forked: Callable[[VmName, str], None],
        on_exit: Callable[[VmName, int], None],
        on_new_zygote: Callable[[], None],
        on_renewed: Callable[[str], None],
        store: FdStore,
        version: str = __version__,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_new_zygote`: workers must hand it their connections. `on_renewed`: what came of `renew`, an error or nothing."""
        self._paths = paths
        self._settings = settings
        self._on_forked = on_forked
        self._on_not_forked = on_not_forked
        self._on_new_zygote = on_new_zygote
        self._on_renewed = on_renewed
        self._store = store
        self._version = version
        self._clock = clock
        self._poll = PacketPoll()
        self._zygote: PacketEnd | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._fresh = False  # the zygote was started by this broker
        self._started: int | None = None  # when it was, as it says
        self._settled = False  # it has said who it is and what it keeps: forks may go to it
        self._due: float | None = None  # when it must have
        self._forks = Forks(ANSWER_SECONDS, clock)
        self._offer = Offer()
        self._handover: Handover | None = None
        self._renewing = False
        self._former = Former(self._poll)
        self.pidfds = Pidfds(on_exit)
        self._poll.add_other(self.pidfds.fileno(), self.pidfds.turn)
        self._ending = False

    # -- start --------------------------------------------------------------------------------------------------------------

    def start(self, stored: list[Stored] | None = None) -> bool:
        """Connect to the zygote, or start one. True if it is a new one. `stored`: given to it unless it keeps something there.

        Raises OSError if none can be started.
        """
        self._offer.add(stored or [])
        try:
            self._greet(connect(self._paths.zygote_socket), fresh=False)
        except (ConnectionRefusedError, FileNotFoundError):  # nobody listens
            self._start_fresh()
            return True
        except BlockingIOError:  # somebody has not taken a single caller for long
            log.error("the zygote takes no calls; another one is started in its place")
            self._start_fresh()
            return True
        return False

    def _start_fresh(self) -> None:
        self._former.add(self._child)
        self._child = start_zygote(self._paths, self._settings, self._paths.zygote_socket)
        self._greet(connect(self._paths.zygote_socket), fresh=True)

    def _greet(self, zygote: PacketEnd, *, fresh: bool) -> None:
        self._zygote = zygote
        self._fresh, self._started, self._settled = fresh, None, False
        self._due = self._clock() + (START_SECONDS if fresh else ANSWER_SECONDS)
        self._poll.add(zygote, self._on_packet, self._zygote_lost)
        self._offer.held.clear()
        self._forks.forget_told()
        self._say(Hello(self._version))

    # -- what is asked of it ------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._poll.fileno()

    def fork(self, name: VmName) -> None:
        """Ask for a worker; `on_forked` or `on_not_forked` follows."""
        self._forks.ask(name)
        if self._zygote is None:
            try:
                self._renew()
            except OSError as error:
                self._forks.answered(name)
                self._on_not_forked(name, f"the zygote cannot be asked: {error}")
                return
        self._send_forks()

    def renew(self, *, even_fresh: bool = True) -> None:
        """Have another zygote take this one's place as soon as it can, with the code as it is on disk now; `on_renewed` follows.

        `even_fresh` False: a zygote that this broker has started is left.
        """
        self._renewing = True
        if self._handover is not None:
            return
        if self._zygote is None:
            self._renewed("there is no zygote")
        elif self._fresh and not (even_fresh and self._settled):
            self._renewed("")
        elif self._settled:
            self._hand_over(mute=False)

    def end_zygote(self) -> None:
        """The zygote shall end with its last worker."""
        self._ending = True
        if self._zygote is not None:
            self._say(Quit())

    # -- what happens -------------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Take what has happened: packets of zygotes, exits of workers."""
        self._poll.turn()

    def next_due(self) -> float | None:
        """When `on_tick` has something to do; None: not by itself."""
        asked = (self._handover.due,) if self._handover is not None else (self._due, self._forks.due)
        return min((due for due in (*asked, self._store.next_due()) if due is not None), default=None)

    def on_tick(self, now: float) -> None:
        """Whoever has not answered in time. What lies here unread has been said: it was this broker that was stopped, or busy."""
        self._store.on_tick(now)
        handover = self._handover
        if handover is not None:
            if handover.due > now or is_readable(handover.heir if handover.told else self._zygote):
                return
            if handover.told:
                self._fail_handover("the new zygote does not come up")
            else:
                self._end_hung("it does not tell what it keeps")
        elif self._is_late(now) and not is_readable(self._zygote):
            self._end_hung("it does not answer")

    def _is_late(self, now: float) -> bool:
        return any(due is not None and due <= now for due in (self._due, self._forks.due))

    @property
    def nothing_left(self) -> bool:
        """Whether zygotes and workers have all ended, as far as this broker has any."""
        return self._zygote is None and not self._former and not self.pidfds

    def kill_rest(self) -> None:
        """End the zygote and the workers that there still are; the VMs run on."""
        self.pidfds.kill_all()
        if self._zygote is not None:
            kill_zygote(self._zygote, self._paths, self._started)

    def close(self) -> None:
        """Let go of everything; zygote and workers run on."""
        self.pidfds.close()
        self._offer.close()
        self._zygote, self._settled = None, False
        self._fail_handover("the broker ends")
        self._former.close()
        let_go(self._child)
        self._poll.close()

    def _on_packet(self, packet: Packet, fds: list[int]) -> None:
        if isinstance(packet, (Forked, NotForked)):
            self._forks.answered(VmName(packet.vm))
        self._forks.heard()
        match packet:
            case Forked() if len(fds) == 1:
                name = VmName(packet.vm)
                self.pidfds.hold(name, packet.pid, fds.pop())
                self._on_forked(name, packet.pid)
            case NotForked():
                self._on_not_forked(VmName(packet.vm), packet.error)
            case Hello() if not self._settled and self._handover is None:
                self._on_hello(packet)
            case Kept() | Dropped() | Told():
                self._on_kept(packet, fds)
            # A Forked whose pidfd did not find a free fd: the worker presents itself all the same, and is watched then.

    def _on_hello(self, hello: Hello) -> None:
        self._started = hello.started
        if not self._fresh and hello.version != self._version:
            log.info(
                "the zygote is of version %s, this is %s: another one takes its place", hello.version, self._version
            )
            self._hand_over(mute=False)
        elif self._store.there:
            self._say(Tell())
        else:
            self._settle()

    def _on_kept(self, packet: Kept | Dropped | Told, fds: list[int]) -> None:
        if self._handover is not None:
            handover = self._handover
            handover.due = self._clock() + START_SECONDS
            self._advance(lambda: handover.from_old(packet, fds))
        elif isinstance(packet, Told):
            self._settle()
        elif isinstance(packet, Dropped):
            self._store.drop(packet.vm, packet.slot)
        elif fds:
            self._offer.held.add((packet.vm, packet.slot))
            self._store.keep(packet.vm, packet.slot, fds.pop())

    def _settle(self) -> None:
        """The zygote can be used: first it gets what it does not have, then it is asked for workers."""
        self._settled, self._due = True, None
        for vm, slot, fd in self._offer.take_missing():
            self._say(Keep(vm, slot, spare=True), fd)
        if self._renewing and not self._fresh:  # which was asked for meanwhile
            self._hand_over(mute=False)
            return
        self._renewed("")
        self._send_forks()

    # -- another zygote -----------------------------------------------------------------------------------------------------

    def _hand_over(self, *, mute: bool) -> None:
        """Begin to replace the zygote by a new one. `mute`: it is of a version that cannot tell what it keeps."""
        at = self._paths.zygote_socket.with_name("zygote.new")
        child = None
        try:
            child = start_zygote(self._paths, self._settings, at)
            heir = connect(at)
        except OSError as error:
            self._former.add(child, kill=True)
            self._stay(f"no other zygote can be started: {error}")
            return
        self._poll.add(heir, self._from_heir, lambda: self._fail_handover("the new zygote has ended"))
        due = self._clock() + START_SECONDS
        self._handover = Handover(None if mute else self._zygote, heir, child, self._version, due)
        self._due = None
        self._advance(self._handover.begin)
        if self._zygote is not None:
            self._poll.arm(self._zygote)

    def _advance(self, step: Callable[[], None]) -> None:
        """One step of the handover; it fails if the heir is gone."""
        try:
            step()
        except OSError as error:
            self._fail_handover(str(error))
        else:
            if self._handover is not None:
                self._poll.arm(self._handover.heir)

    def _from_heir(self, packet: Packet, _: list[int]) -> None:
        handover = self._handover
        if handover is not None and handover.from_heir(packet):
            self._take_over(handover)

    def _take_over(self, handover: Handover) -> None:
        """The heir has everything: it takes the place of the old one."""
        at = self._paths.zygote_socket
        try:
            os.rename(at.with_name("zygote.new"), at)
        except OSError as error:
            self._fail_handover(str(error))
            return
        self._handover = None
        old = self._zygote
        if old is not None:
            self._retire(old)
        self._former.add(self._child)
        self._child = handover.child
        self._zygote, self._fresh, self._started = handover.heir, True, None
        self._poll.add(handover.heir, self._on_packet, self._zygote_lost)
        self._offer.held.clear()
        log.info("zygote %d has taken over", handover.child.pid)
        self._on_new_zygote()
        self._renewed("")
        if self._store.there:
            self._settled = False
            self._due = self._clock() + ANSWER_SECONDS
            self._say(Tell())
        else:
            self._settle()

    def _retire(self, old: PacketEnd) -> None:
        self._poll.add(old, self._from_retired, lambda: self._poll.close_end(old))
        mute = not self._settled and self._started is None  # it never said who it is: it cannot tell, but it can fork
        try:
            for name in self._forks.tell(again=True) if mute else ():  # they inherit what it keeps, and hand it on
                old.send(fork_packet(self._paths, self._settings, name))
            old.send(Quit() if mute else Retire())
            self._poll.arm(old)
        except OSError as error:
            log.info("the old zygote is gone: %s", error)
            self._poll.close_end(old)

    def _from_retired(self, packet: Packet, fds: list[int]) -> None:
        """What a zygote that has retired still hears is the new one's."""
        if isinstance(packet, (Forked, NotForked)):
            self._on_packet(packet, fds)
        elif self._zygote is not None:
            try:
                pass_on(packet, fds, self._zygote)
                if isinstance(packet, Exited):
                    self._zygote.send(packet)
            except OSError:
                return  # its end is read in its turn
            self._poll.arm(self._zygote)

    def _fail_handover(self, why: str) -> None:
        handover, self._handover = self._handover, None
        if handover is None:
            return
        self._poll.close_end(handover.heir)
        self._former.add(handover.child, kill=True)
        self._paths.zygote_socket.with_name("zygote.new").unlink(missing_ok=True)
        self._stay(why)

    def _stay(self, why: str) -> None:
        """The old zygote is not replaced, and serves on."""
        log.error("the zygote is not replaced: %s", why)
        self._renewed(why)
        if self._zygote is not None and not self._settled:
            self._settle()
        self._send_forks()

    def _renewed(self, error: str) -> None:
        if self._renewing:
            self._renewing = False
            self._on_renewed(error)

    # -- a zygote that is lost, or hangs --------------------------------------------------------------------------------------

    def _zygote_lost(self) -> None:
        mute = not self._settled and not self._fresh and self._started is None
        self._forget_zygote()
        if self._handover is not None:
            self._advance(self._handover.old_is_gone)
            return
        if self._ending and not self._forks:
            self._former.add(self._child)
            self._child = None
            return
        try:
            if mute and self._reach_mute():
                return
            log.error("the zygote is gone; another one takes its place")
            self._renew()
        except OSError as error:
            self._without_zygote(error)

    def _reach_mute(self) -> bool:
        """A zygote that hangs up on a greeting is of a version that knew none. False if there is none."""
        try:
            self._zygote = connect(self._paths.zygote_socket)
        except OSError:
            return False
        self._poll.add(self._zygote, self._on_packet, self._zygote_lost)
        self._fresh = False
        log.info("the zygote does not tell its version, so it is an old one: another one takes its place")
        self._hand_over(mute=True)
        return True

    def _end_hung(self, why: str) -> None:
        """What the zygote alone kept is lost; the workers hand the new one theirs."""
        zygote = self._zygote
        if zygote is None:
            return
        if self._fresh and self._child is not None:
            self._former.add(self._child, kill=True)
            self._child, killed = None, True
        else:
            killed = kill_zygote(zygote, self._paths, self._started)
        log.error("the zygote is %s: %s", "ended" if killed else "left alone", why)
        self._forget_zygote()
        if self._handover is not None:
            self._handover.due = self._clock() + START_SECONDS
            self._advance(self._handover.old_is_gone)
            return
        try:
            self._start_fresh()
            self._on_new_zygote()
        except OSError as error:
            self._without_zygote(error)

    def _without_zygote(self, error: OSError) -> None:
        log.error("no zygote can be started (%s); the next worker that is needed tries again", error)
        self._renewed(f"no zygote can be started: {error}")

    def _forget_zygote(self) -> None:
        assert self._zygote is not None
        self._poll.close_end(self._zygote)
        self._zygote, self._settled, self._due = None, False, None
        self._forks.forget_told()
        if self._child is not None:
            self._child.poll()

    def _renew(self) -> None:
        if self.start():
            self._on_new_zygote()

    # -- packets and pidfds -------------------------------------------------------------------------------------------------

    def _send_forks(self) -> None:
        if not self._settled or self._handover is not None:
            return
        for name in self._forks.tell():
            self._say(fork_packet(self._paths, self._settings, name))

    def _say(self, packet: Packet, fd: int | None = None) -> None:
        """Tell the zygote; if it is gone, that is read from its connection in its turn, and what was asked is asked of the next one."""
        assert self._zygote is not None
        try:
            self._zygote.send(packet, fd)
        except OSError as error:
            log.info("the zygote cannot be told: %s", error)
            return
        self._poll.arm(self._zygote)
