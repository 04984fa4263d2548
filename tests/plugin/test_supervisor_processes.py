"""The supervisor with real processes: readiness, restarts, and that nothing is ever left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.launch import Launch
from metaclaw_plugin.supervisor import child as child_module
from metaclaw_plugin.supervisor.checks import check_disk, check_ports
from metaclaw_plugin.supervisor.plan import Service
from metaclaw_plugin.supervisor.state import Home, created_at, same_process
from metaclaw_plugin.supervisor.supervise import Supervisor

# A server with a child of its own, as vLLM has; it notes both process ids.
SERVER = textwrap.dedent(
    """
    import http.server, os, subprocess, sys
    port, notes = int(sys.argv[1]), sys.argv[2]
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    with open(notes, "a") as file:
        file.write(f"{os.getpid()} {child.pid}\\n")
    http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
    """
)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create()
    return home


@pytest.fixture
def server(tmp_path: Path, free_port: Callable[[], int]) -> Service:
    port = free_port()
    argv = (sys.executable, "-c", SERVER, str(port), str(tmp_path / "notes"))
    return Service("server", Launch(argv), port=port, ready_path="/", grace=2.0, port_setting="the test")


def noted(tmp_path: Path) -> list[int]:
    """Process ids that servers noted, theirs and their children's; none if no server came so far."""
    notes = tmp_path / "notes"
    return [int(word) for word in notes.read_text().split()] if notes.exists() else []


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a test did, what it started is gone afterwards."""
    yield
    for pid in noted(tmp_path):
        wait_for(lambda pid=pid: not running(pid))


def test_a_start_ends_when_all_is_ready_and_stop_leaves_no_process(server: Service, home: Home, tmp_path: Path) -> None:
    with Supervisor([server], home, None) as supervisor:
        assert supervisor.start()
        state = home.read()
        assert state is not None
        assert [(s.name, s.phase, s.port) for s in state.services] == [("server", "ready", server.port)]
        pids = noted(tmp_path)
        assert len(pids) == 2
        assert all(running(pid) for pid in pids)
    assert not any(running(pid) for pid in pids)
    state = home.read()
    assert state is not None
    assert state.services[0].phase == "stopped"


def test_what_dies_is_started_again_and_its_children_do_not_pile_up(
    server: Service, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", (0.1,))
    with Supervisor([server], home, None) as supervisor:
        supervisor.start()
        first, grandchild = noted(tmp_path)
        os.kill(first, signal.SIGKILL)

        def back() -> bool:
            supervisor._look()
            state = supervisor.children[0].state
            return state.restarts == 1 and state.phase == "ready"

        wait_for(back)
        assert not running(grandchild)
        assert len(noted(tmp_path)) == 4


def test_kill_9_of_the_supervisor_leaves_nothing_running(server: Service, home: Home, tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from metaclaw_plugin.launch import Launch
        from metaclaw_plugin.supervisor.plan import Service
        from metaclaw_plugin.supervisor.state import Home
        from metaclaw_plugin.supervisor.supervise import Supervisor

        service = Service("server", Launch({server.launch.argv!r}), port={server.port}, ready_path="/", grace=2.0)
        with Supervisor([service], Home(Path({str(home.path)!r})), None) as supervisor:
            supervisor.start()
            print("ready", flush=True)
            supervisor.run()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    pids = noted(tmp_path)
    state = home.read()
    assert state is not None
    guard = state.services[0].pid
    assert guard is not None
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in (*pids, guard):
        wait_for(lambda pid=pid: not running(pid))


def test_kill_9_of_the_guard_does_not_leave_its_command_behind(
    server: Service, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", (60.0,))
    argv = (sys.executable, "-c", SERVER.replace(", start_new_session=True", ""), *server.launch.argv[3:])
    same_session = Service("server", Launch(argv), port=server.port, ready_path="/", grace=2.0)
    with Supervisor([same_session], home, None) as supervisor:
        supervisor.start()
        guard = supervisor.children[0].state.pid
        assert guard is not None
        os.kill(guard, signal.SIGKILL)
        wait_for(lambda: [supervisor._look(), supervisor.children[0].state.phase][1] == "waiting")
        for pid in noted(tmp_path):
            wait_for(lambda pid=pid: not running(pid))


def test_a_death_at_start_tells_the_last_meaningful_line_and_ends_the_others(
    server: Service, home: Home, tmp_path: Path
) -> None:
    code = "import sys, time; time.sleep(1); print('INFO: x'); sys.exit('error: [Errno 28] No space left on device')"
    broken = Service("broken", Launch((sys.executable, "-c", code)), ready_line="up")
    with Supervisor([server, broken], home, None) as supervisor:
        with pytest.raises(ProcessError) as caught:
            supervisor.start()
        assert not any(running(pid) for pid in noted(tmp_path))
    message = str(caught.value)
    assert "the broken died at start: error: [Errno 28] No space left on device; the disk is full" in message
    assert str(home.log("broken")) in message
    state = home.read()
    assert state is not None
    assert state.failure == message


def test_a_command_that_ignores_sigterm_is_killed_after_its_grace(home: Home, tmp_path: Path) -> None:
    code = f"""
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(tmp_path / "notes")!r}, "w").write(str(os.getpid()))
        print("up", flush=True)
        time.sleep(600)
    """
    stubborn = Service("stubborn", Launch((sys.executable, "-c", textwrap.dedent(code))), ready_line="up", grace=0.3)
    with Supervisor([stubborn], home, None) as supervisor:
        supervisor.start()
        (pid,) = noted(tmp_path)
        assert running(pid)
    assert not running(pid)


def test_a_command_that_is_not_there_fails_the_start(home: Home) -> None:
    missing = Service("missing", Launch(("/nowhere/metaclaw-nothing",)), ready_line="up")
    with (
        Supervisor([missing], home, None) as supervisor,
        pytest.raises(ProcessError, match="cannot start /nowhere/metaclaw-nothing: No such file"),
    ):
        supervisor.start()


def test_a_taken_port_is_named_with_its_holder_and_the_setting(server: Service, home: Home) -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = Service("gateway", server.launch, port=holder.getsockname()[1], port_setting="metaclaw.gateway.port")
        with pytest.raises(ProcessError, match=r"is taken by process \d+ .*change metaclaw.gateway.port"):
            check_ports([server, taken])
        with Supervisor([server, taken], home, None) as supervisor, pytest.raises(ProcessError):
            supervisor.start()


def test_two_services_on_one_port_are_refused(server: Service) -> None:
    with pytest.raises(ProcessError, match="both want port"):
        check_ports([server, server])


def test_a_full_disk_is_refused_with_the_figures(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"MiB are free on the disk of .* set METACLAW_HOME"):
        check_disk(tmp_path, least=2**62)


def test_what_was_asked_for_is_remembered_for_a_restart(home: Home) -> None:
    with Supervisor([], home, None, ["trainer"]) as supervisor:
        supervisor.start()
        state = home.read()
    assert state is not None
    assert state.only == ("trainer",)


def test_a_second_supervisor_of_the_same_home_is_refused(home: Home) -> None:
    with home.lock(), pytest.raises(ProcessError, match="already runs"), home.lock():
        pass
    with home.lock():
        pass


def test_a_reused_process_id_is_not_ours() -> None:
    pid = os.getpid()
    created = created_at(pid)
    assert created is not None
    assert same_process(pid, created)
    assert not same_process(pid, created - 10)


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProcessError, match="set METACLAW_HOME"):
        Home(tmp_path / "file" / "home").create()


def test_it_is_ready_only_after_its_first_request(home: Home, free_port: Callable[[], int], tmp_path: Path) -> None:
    code = """
        import http.server, sys, time

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(0.5)
                open(sys.argv[2], "wb").write(body)
                self.send_response(200)
                self.end_headers()

        http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
    port, asked = free_port(), tmp_path / "asked"
    launch = Launch((sys.executable, "-c", textwrap.dedent(code), str(port), str(asked)))
    slow = Service("slow", launch, port=port, ready_path="/health", warm_up=("/v1/completions", {"prompt": "Hello"}))
    with Supervisor([slow], home, None) as supervisor:
        supervisor.start()
        assert asked.read_bytes() == b'{"prompt":"Hello"}'


def test_each_death_is_told_by_its_own_log(
    server: Service, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "BACKOFF", (0.05,))
    notes = tmp_path / "times"
    code = f"""
        import sys, time
        open({str(notes)!r}, "a").write("x")
        print("up", flush=True)
        time.sleep(0.3)
        sys.exit("ValueError: death " + str(len(open({str(notes)!r}).read())))
    """
    mortal = Service("mortal", Launch((sys.executable, "-c", textwrap.dedent(code))), ready_line="up")
    with Supervisor([mortal], home, None) as supervisor:
        supervisor.start()
        told: list[str] = []

        def two_deaths() -> bool:
            supervisor._look()
            state = supervisor.children[0].state
            if state.phase == "waiting" and state.detail not in told:
                told.append(state.detail)
            return len(told) == 2

        wait_for(two_deaths)
        assert told == ["ValueError: death 1", "ValueError: death 2"]
