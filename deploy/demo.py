# SPDX-License-Identifier: Apache-2.0
"""`make demo`: vmloop on two VMs, told step by step with the commands that you would type yourself. Ends with nothing left behind.

Uses real QEMU where it is installed, else simulated VMs (and says so). Exit code 0 if everything went as told.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

VMLOOP: Final = Path(sys.executable).with_name("vmloop")
REAL: Final = "qemu-system-x86_64"
# The smallest VMs: the firmware runs, and nothing else.
REAL_QEMU: Final = f"""binary = "{REAL}"
args = ["-machine", "q35,accel=kvm:tcg", "-m", "64", "-nodefaults", "-display", "none"]"""
SIMULATED_QEMU: Final = 'binary = "simulated"'
STEP_SECONDS: Final = 30.0  # for any one command; all of them together take a few seconds

_COLOUR: Final = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class DemoFailed(Exception):
    """Something did not go as told."""


class Demo:
    """One root directory, one broker, one listener to events."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started = time.monotonic()
        self._print_lock = threading.Lock()
        self._children: list[subprocess.Popen[str]] = []

    # -- telling ------------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._print(f"\n{_paint('1', f'[{time.monotonic() - self.started:4.1f} s] {text}')}")

    def check(self, holds: bool, claim: str) -> None:
        if not holds:
            raise DemoFailed(claim)
        self._print(f"    {_paint('32', '✓')} {claim}")

    def _print(self, line: str) -> None:
        with self._print_lock:
            print(line, flush=True)

    # -- doing --------------------------------------------------------------------------------------------------------------

    def run(self, *words: str, fails: bool = False) -> str:
        """Run a vmloop command and show it with what it prints; its output."""
        self._print(f"    {_paint('36', '$ vmloop ' + ' '.join(words))}")
        done = subprocess.run(self._argv(*words), capture_output=True, text=True, timeout=STEP_SECONDS, check=False)
        for line in (done.stdout + done.stderr).splitlines():
            self._print(f"      {line}")
        if (done.returncode != 0) is not fails:
            raise DemoFailed(f"vmloop {words[0]} ended with status {done.returncode}")
        return done.stdout + done.stderr

    def ask(self, *words: str) -> Any:
        """The JSON that a command gives, not shown."""
        argv = self._argv("--json", *words)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=STEP_SECONDS, check=False)
        if done.returncode != 0:
            raise DemoFailed(done.stderr.strip())
        return json.loads(done.stdout)

    def vm(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(vm for vm in self.ask("list") if vm["name"] == name)
        return found

    def start_broker(self) -> subprocess.Popen[str]:
        log = (self.root / "broker.log").open("w")
        broker = subprocess.Popen(self._argv("broker"), stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
        log.close()
        self._children.append(broker)
        self.wait(lambda: self._answers(broker), "the broker answers")
        return broker

    def follow_events(self) -> None:
        """Show every event as it comes, in between."""
        listener = subprocess.Popen(
            self._argv("--json", "events", "--follow"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        self._children.append(listener)
        threading.Thread(target=self._show_events, args=(listener,), daemon=True).start()

    def wait(self, condition: Any, claim: str, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise DemoFailed(f"not within {seconds:g} s: {claim}")
            select.select([], [], [], 0.05)

    def close(self) -> None:
        for child in reversed(self._children):
            if child.poll() is None:
                child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STEP_SECONDS)
            if child.stdout is not None:
                child.stdout.close()

    def processes(self) -> list[str]:
        """What still runs of this demo's root."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (directory / "cmdline").read_bytes()
                if os.fsencode(self.root) in command + (directory / "environ").read_bytes() and command:
                    found.append(f"{directory.name}: {command.replace(bytes(1), b' ').decode(errors='replace'):.100}")
        return [line for line in found if not line.startswith(f"{os.getpid()}:")]

    def _argv(self, *words: str) -> list[str]:
        return [str(VMLOOP), "--root", str(self.root), *words]

    def _answers(self, broker: subprocess.Popen[str]) -> bool:
        if broker.poll() is not None:
            raise DemoFailed(f"the broker ended: {(self.root / 'broker.log').read_text()}")
        return (
            subprocess.run(self._argv("list"), capture_output=True, timeout=STEP_SECONDS, check=False).returncode == 0
        )

    def _show_events(self, listener: subprocess.Popen[str]) -> None:
        assert listener.stdout is not None
        with contextlib.suppress(ValueError):  # closed at the end
            for line in listener.stdout:
                event = json.loads(line)
                data = ", ".join(f"{key}={value}" for key, value in event["data"].items())
                place = f"~ {event['vm']} {event['epoch']}.{event['seq']}"
                self._print(f"      {_paint('33', place)} {event['event']} {data}")


def main() -> int:
    """Tell the story; 0 if it came true."""
    real = shutil.which(REAL) is not None
    root = Path(tempfile.mkdtemp(prefix="vmloop-demo-"))
    demo = Demo(root)
    try:
        _tell(demo, real)
    except DemoFailed as error:
        print(f"\nvmloop demo: it did not go as told: {error}", file=sys.stderr)
        print((root / "broker.log").read_text()[-2000:], file=sys.stderr)
        return 1
    finally:
        demo.close()
        for line in demo.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)
    print(f"\nDone in {time.monotonic() - demo.started:.1f} s. Next: README.md, or `vmloop --help`.")
    return 0


def _tell(demo: Demo, real: bool) -> None:
    if real:
        print(f"vmloop demo on real QEMU ({shutil.which(REAL)}), everything under {demo.root}")
    else:
        print(f"vmloop demo on SIMULATED VMs ({REAL} is not installed), everything under {demo.root}")
    demo.say("A broker: it dispatches, and never touches a VM itself. Events are shown with ~ as they come.")
    broker = demo.start_broker()
    demo.follow_events()

    demo.say("Two VMs. Each gets a process of its own (a worker) that owns its monitor.")
    for name in ("alpha", "beta"):
        definition = demo.root / f"{name}.toml"
        definition.write_text(f'name = "{name}"\n[qemu]\n{REAL_QEMU if real else SIMULATED_QEMU}\n')
        demo.run("define", str(definition))
        demo.run("start", name)
    demo.run("list")

    demo.say("Commands go to QEMU, states follow QEMU's own events.")
    demo.run("qmp", "alpha", "query-status")
    demo.run("pause", "alpha")
    demo.run("resume", "alpha")

    demo.say("Now QEMU of beta is frozen (SIGSTOP). It answers nothing; alpha must not notice.")
    os.kill(demo.vm("beta")["pid"], signal.SIGSTOP)
    demo.run("--timeout", "3", "qmp", "beta", "query-status", fails=True)
    before = time.monotonic()
    demo.run("qmp", "alpha", "query-status")
    demo.check(time.monotonic() - before < 2, "alpha answered while beta stood still")
    demo.run("list")
    demo.check(demo.vm("beta")["monitor"] == "frozen", "beta is known to be frozen, not merely slow")

    demo.say("A frozen VM can still be killed, at once, and its end is told with a reason.")
    before = time.monotonic()
    demo.run("kill", "beta")
    demo.check(time.monotonic() - before < 3, "killed without waiting for an answer")
    demo.check((demo.vm("beta")["state"], demo.vm("beta")["reason"]) == ("shutoff", "destroyed"), "shutoff (destroyed)")

    demo.say("Kill -9 alpha's worker: QEMU runs on, and the next worker takes its connection over.")
    alpha = demo.vm("alpha")
    os.kill(alpha["worker_pid"], signal.SIGKILL)
    demo.run("qmp", "alpha", "query-status")
    after = demo.vm("alpha")
    demo.check(after["worker_pid"] != alpha["worker_pid"], "another worker answered")
    demo.check(after["pid"] == alpha["pid"], "alpha's QEMU never noticed")

    demo.say("End everything, VMs included.")
    demo.run("shutdown", "--kill")
    demo.check(broker.wait(STEP_SECONDS) == 0, "the broker ended with status 0")
    demo.close()
    demo.wait(lambda: not demo.processes(), f"no process is left: {demo.processes()}")
    demo.check(True, "no process is left")


def _paint(colour: str, text: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if _COLOUR else text


if __name__ == "__main__":
    sys.exit(main())
