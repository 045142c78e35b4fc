"""Checks that the daemon is the service that its unit describes, without systemd as init.

usage: service.py DAEMON UNIT

Goal: with no more capabilities than the unit gives, the daemon serves a disk; it tells the service manager when it is
ready, when it reloads and when it stops, keeps the watchdog fed, and takes over a listening socket.
Method: play the service manager: a socket at NOTIFY_SOCKET, setpriv with the unit's bounding set, signals, and
systemd-socket-activate.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

DEADLINE_S = 30


class Manager:
    """The notification socket of a service manager."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)

    def wait_for(self, wanted, process):
        """Waits for a notification with the line `wanted`; returns all lines up to it."""
        seen, end = [], time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            self.socket.settimeout(0.5)
            try:
                lines = self.socket.recv(65536).decode().splitlines()
            except TimeoutError:
                if process.poll() is not None:
                    sys.exit(f"the daemon ended with {process.returncode} before it said {wanted}; it said {seen}")
                continue
            seen += lines
            if wanted in lines:
                return seen
        sys.exit(f"the daemon did not say {wanted} within {DEADLINE_S} s; it said {seen}")


def unit_value(unit, key):
    """The value of a key of the unit."""
    with open(unit, encoding="utf-8") as file:
        return re.search(rf"^{key}=(.*)$", file.read(), re.MULTILINE)[1]


def confined(unit):
    """A command prefix that leaves only the unit's capabilities. An ordinary user has fewer anyway."""
    if os.geteuid() != 0:
        return []
    capabilities = [name.removeprefix("CAP_").lower() for name in unit_value(unit, "CapabilityBoundingSet").split()]
    kept = ",".join(["-all", *(f"+{name}" for name in capabilities if is_held(name))])
    return ["setpriv", f"--bounding-set={kept}", f"--inh-caps={kept}", "--no-new-privs"]


def is_held(capability):
    """Containers lack some capabilities, and setpriv cannot add them."""
    held = subprocess.run(["setpriv", "--dump"], capture_output=True, text=True, check=True).stdout
    bounding = re.search(r"Capability bounding set: (.*)", held)[1]
    return capability in bounding.split(",")


def run(*command, **options):
    return subprocess.run(command, check=True, timeout=DEADLINE_S, capture_output=True, text=True, **options).stdout


def check(daemon, unit, folder):
    run_dir = os.path.join(folder, "run")
    control = os.path.join(run_dir, "ctl.sock")
    serve = [daemon, "serve", "--run-dir", run_dir, "--metrics", "none"]
    ctl = [daemon, "ctl", "--ctl", control, "--timeout", "20"]
    manager = Manager(folder)
    environment = {**os.environ, "NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "2000000"}

    process = subprocess.Popen([*confined(unit), *serve], env=environment)
    try:
        manager.wait_for("READY=1", process)
        image = os.path.join(folder, "disk.img")
        with open(image, "wb") as file:
            file.truncate(1 << 20)
        # Of another user, and closed to everybody else: that is what CAP_DAC_OVERRIDE is for.
        os.chmod(image, 0o600)
        if os.geteuid() == 0:
            os.chown(image, 65534, 65534)
        run(*ctl, "attach", "d1", f"raw:{image}", "--nbd")
        manager.wait_for("WATCHDOG=1", process)
        manager.wait_for("WATCHDOG=1", process)
        process.send_signal(signal.SIGHUP)
        said = manager.wait_for("RELOADING=1", process)
        if not any(line.startswith("MONOTONIC_USEC=") for line in said):
            sys.exit("RELOADING=1 came without MONOTONIC_USEC: Type=notify-reload needs it")
        manager.wait_for("READY=1", process)
        process.send_signal(signal.SIGTERM)
        manager.wait_for("STOPPING=1", process)
        if process.wait(DEADLINE_S) != 0:
            sys.exit(f"the daemon ended with {process.returncode} after SIGTERM")
    finally:
        if process.poll() is None:
            process.kill()

    # systemd-socket-activate starts the daemon at the first connection, which must be served and not lost.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    activated = subprocess.Popen(
        ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "--fdname=nbd", *serve], start_new_session=True
    )
    try:
        end = time.monotonic() + DEADLINE_S
        while True:
            try:
                size = run("nbdinfo", "--size", f"nbd://127.0.0.1:{port}/d1")
                break
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                # Before systemd-socket-activate listens, and before the disk of the first run is back.
                if time.monotonic() > end:
                    sys.exit(f"no disk d1 behind the socket that was handed over: {error.stderr}")
                time.sleep(0.2)
        if int(size) != 1 << 20:
            sys.exit(f"the disk behind the socket that was handed over has {size} bytes")
    finally:
        os.killpg(activated.pid, signal.SIGTERM)
        activated.wait(DEADLINE_S)
    print("the daemon is the service that its unit describes")


def main(arguments):
    if len(arguments) != 2:
        sys.exit(__doc__)
    # Short, because a socket's path holds 107 bytes.
    folder = tempfile.mkdtemp(prefix="blktapd.", dir="/tmp")
    try:
        check(*arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
