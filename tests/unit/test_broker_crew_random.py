# SPDX-License-Identifier: Apache-2.0
"""Workers, VMs and clients do what they like, in any order: every request ends with one answer, and every VM has a way on."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vmloop.broker.crew import LAST_WORDS
from vmloop.broker.roster import WorkerState
from vmloop.common.names import VmName
from vmloop.common.settings import BrokerSettings, RestartSettings

from ..fakes.broker_desk import Desk
from ..fakes.broker_world import Machine, Process, World

NAMES = [VmName("a"), VmName("b")]
PICKS = st.integers(0, 7)
LONGEST = 4.0  # the longest timeout of a request


def serving(process: Process) -> bool:
    return process.living and process.incarnation > 0 and not process.left


class Crew(RuleBasedStateMachine):
    """The world's steps; each is possible only where it is possible for the real ones."""

    @initialize(running=st.booleans())
    def begin(self, running: bool) -> None:
        self.desk = Desk(
            BrokerSettings(worker_hello=2.0, requests_per_vm=6),
            RestartSettings(first_delay=0.2, max_delay=1.0, stable_after=1.0),
        )
        self.world = World(self.desk)
        self.desk.known("a")
        self.world.machines[NAMES[1]] = Machine(living=running)
        entry = self.desk.known("b", state="unknown", alive=running)
        if running:
            self.desk.core.crew.adopt(entry, self.desk.now)
        self.world.perform()

    def some(self, condition: Callable[[Process], object]) -> list[Process]:
        return [process for process in self.world.processes if condition(process)] if hasattr(self, "world") else []

    # -- clients ------------------------------------------------------------------------------------------------------------

    @rule(
        op=st.sampled_from(["qmp", "qmp", "stop", "pause", "events", "start", "start", "define", "undefine", "wait"]),
        name=st.sampled_from(NAMES),
        seconds=st.floats(0.5, LONGEST),
        reading=st.booleans(),
    )
    def a_client_asks(self, op: str, name: VmName, seconds: float, reading: bool) -> None:
        self.world.ask(op, name, seconds, reading=(reading and op == "qmp") or op == "events")

    # -- the zygote ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.wanted)
    @rule()
    def a_worker_is_forked(self) -> None:
        self.world.fork()

    @precondition(lambda self: self.world.wanted)
    @rule()
    def no_worker_can_be_forked(self) -> None:
        self.world.refuse_fork()

    @precondition(lambda self: self.world.untold)
    @rule()
    def the_broker_hears_of_a_fork(self) -> None:
        self.world.tell_forked()

    @precondition(
        lambda self: self.some(lambda process: process.watched and not process.living and not process.exit_told)
    )
    @rule(pick=PICKS)
    def the_broker_hears_of_an_end(self, pick: int) -> None:
        ended = self.some(lambda process: process.watched and not process.living and not process.exit_told)
        self.world.tell_exit(ended[pick % len(ended)])

    # -- workers ------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.some(lambda process: process.living and not process.incarnation))
    @rule(pick=PICKS)
    def a_worker_begins(self, pick: int) -> None:
        unborn = self.some(lambda process: process.living and not process.incarnation)
        self.world.begin(unborn[pick % len(unborn)])

    @precondition(lambda self: self.some(lambda process: process.out))
    @rule(pick=PICKS)
    def the_broker_hears_a_worker(self, pick: int) -> None:
        speaking = self.some(lambda process: process.out)
        self.world.deliver(speaking[pick % len(speaking)])

    @precondition(lambda self: self.some(lambda process: serving(process) and process.has))
    @rule(pick=PICKS, which=PICKS)
    def a_worker_answers(self, pick: int, which: int) -> None:
        busy = self.some(lambda process: serving(process) and process.has)
        process = busy[pick % len(busy)]
        self.world.answer(process, list(process.has)[which % len(process.has)])

    @precondition(lambda self: self.some(serving))
    @rule(pick=PICKS)
    def a_worker_connects_again(self, pick: int) -> None:
        connected = self.some(serving)
        self.world.connect(connected[pick % len(connected)])

    @precondition(lambda self: self.some(serving))
    @rule(pick=PICKS)
    def a_worker_says_goodbye(self, pick: int) -> None:
        staying = self.some(serving)
        self.world.leave(staying[pick % len(staying)])

    @precondition(lambda self: self.some(lambda process: process.living and process.left))
    @rule(pick=PICKS)
    def a_worker_that_said_goodbye_ends(self, pick: int) -> None:
        leaving = self.some(lambda process: process.living and process.left)
        self.world.end(leaving[pick % len(leaving)])

    @precondition(lambda self: self.some(lambda process: process.living))
    @rule(pick=PICKS, sent_to_qemu=st.booleans(), cut=st.booleans())
    def a_worker_is_killed(self, pick: int, sent_to_qemu: bool, cut: bool) -> None:
        living = self.some(lambda process: process.living)
        self.world.kill(living[pick % len(living)], sent_to_qemu=sent_to_qemu, cut=cut)

    @rule(name=st.sampled_from(NAMES))
    def a_vm_ends(self, name: VmName) -> None:
        self.world.vm_ends(name)

    # -- time ---------------------------------------------------------------------------------------------------------------

    @rule(ahead=st.sampled_from([0.001, LAST_WORDS, 0.1, 1.0, 3.0]))
    def time_passes(self, ahead: float) -> None:
        self.world.tick(ahead)

    # -- what is always true, and what is in the end ------------------------------------------------------------------------

    @invariant()
    def the_world_is_in_order(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """From here on everything works: what is asked is answered in time, and every VM that runs has a worker that serves it."""
        if not hasattr(self, "world"):
            return
        asked = [(name, number) for number, name in enumerate(NAMES)]
        for name, _ in asked:
            self.world.ask("qmp", name, LONGEST)
        for _ in range(120):
            self.everything_works_for_a_moment()
            self.world.check()
        assert len(self.desk.core.inflight) == 0
        for vm in self.desk.core.roster:
            assert vm.worker.state in (WorkerState.READY, WorkerState.ABSENT), (
                f"{vm.name} is stuck in {vm.worker.state}"
            )
            assert vm.worker.state is WorkerState.READY or not vm.alive, f"{vm.name} runs and nobody serves it"

    def everything_works_for_a_moment(self) -> None:
        world = self.world
        while world.wanted:
            world.fork()
        while world.untold:
            world.tell_forked()
        for process in world.processes:
            if process.living and not process.incarnation:
                world.begin(process)
            while serving(process) and process.has:
                world.answer(process, next(iter(process.has)))
            while process.out:
                world.deliver(process)
            if process.living and process.left:
                world.end(process)
            if process.watched and not process.living and not process.exit_told:
                world.tell_exit(process)
        world.tick(0.1)


TestCrew = Crew.TestCase
TestCrew.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
