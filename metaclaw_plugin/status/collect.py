"""The whole status, whatever is down."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

from metaclaw_plugin.errors import ProcessError, StoreError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.status.probes import Answer, Question, ask_all
from metaclaw_plugin.status.store_reader import StoredAgent, StoreView, read_store
from metaclaw_plugin.status.why import TrainerView, why_not_training
from metaclaw_plugin.supervisor.plan import reachable, trains
from metaclaw_plugin.supervisor.state import Home, ServiceState, SupervisorState, same_process

HEARTBEAT_DEAD = 12.0  # seconds without a heartbeat after which a worker does not count as running


@dataclass(frozen=True)
class ProcessStatus:
    """One process of the house."""

    name: str
    state: str  # ready, starting, waiting (to be started again), stopped, down
    where: str  # URL, or empty
    detail: str = ""
    pid: int | None = None  # of its guard, when supervised
    restarts: int = 0
    seconds: float | None = None  # since it is in this state


@dataclass(frozen=True)
class Running:
    """The processes, and what the trainer said when it was asked."""

    processes: tuple[ProcessStatus, ...]
    trainer: TrainerView
    supervised: bool  # by `metaclaw start`
    worker_problem: str | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class AgentStatus:
    """One agent: store and trainer put together."""

    name: str
    mode: str
    version: int
    traces: int
    waiting: int  # traces that are not scored or not forwarded yet
    queued: int | None  # samples at the trainer; None: it did not say
    batch_size: int | None
    trained: int
    why: str


@dataclass(frozen=True)
class Status:
    """What ``metaclaw status`` shows."""

    home: str
    running: bool  # under `metaclaw start`
    processes: tuple[ProcessStatus, ...]
    agents: tuple[AgentStatus, ...]
    counters: tuple[tuple[str, str, int], ...]
    problems: tuple[str, ...]


def collect(settings: Settings) -> Status:
    """Look at everything once. Nothing that is down makes it fail; what could not be read is in ``problems``."""
    problems: list[str] = []
    store = StoreView()
    try:
        store = read_store(settings.store_url)
    except StoreError as error:
        problems.append(str(error))
    running = look_at_processes(settings, store.worker)
    agents = tuple(_agent(agent, settings, running.trainer, running.worker_problem) for agent in store.agents)
    return Status(
        home=str(settings.home),
        running=running.supervised,
        processes=running.processes,
        agents=agents,
        counters=store.counters,
        problems=(*running.problems, *problems, *store.problems),
    )


def look_at_processes(settings: Settings, worker: tuple[str, float] | None) -> Running:
    """Ask every process once; ``worker`` is who was last at work, and when, by the store."""
    problems: list[str] = []
    supervisor = _supervisor(settings, problems)
    answers = ask_all(_questions(settings))
    processes = _processes(settings, supervisor, answers, worker)
    at_work = next((found.state for found in processes if found.name == "worker"), "down") in ("ready", "starting")
    return Running(
        processes=processes,
        trainer=_trainer_view(answers.get("trainer")),
        supervised=supervisor is not None,
        worker_problem=None if at_work else "does not run",
        problems=tuple(problems),
    )


def _supervisor(settings: Settings, problems: list[str]) -> SupervisorState | None:
    try:
        state = Home(settings.home).read()
    except ProcessError as error:
        problems.append(str(error))
        return None
    return state if state is not None and state.alive() else None


def _questions(settings: Settings) -> dict[str, Question]:
    gateway = settings.gateway
    questions = {"gateway": Question(f"http://{reachable(gateway.host)}:{gateway.port}", "/health/liveliness")}
    if trains(settings):
        questions["trainer"] = Question(settings.rl.remote_url, "/v1/agents", settings.rl.remote_api_key)
        questions["vllm"] = Question(settings.vllm.url, "/health")
    if (console := settings.console).enabled:
        questions["console"] = Question(f"http://{reachable(console.host)}:{console.port}", "/healthz")
    return questions


def _processes(
    settings: Settings, supervisor: SupervisorState | None, answers: dict[str, Answer], worker: tuple[str, float] | None
) -> tuple[ProcessStatus, ...]:
    supervised = {service.name: service for service in supervisor.services} if supervisor else {}
    urls = {name: question.url for name, question in _questions(settings).items()}
    found = []
    for name in ("vllm", "trainer", "gateway", "worker", "console"):
        if name in supervised or name in answers:
            found.append(_process(name, supervised.get(name), answers.get(name), urls.get(name, "")))
    if "worker" not in supervised:
        found.append(_lone_worker(worker))
    return tuple(found)


def _lone_worker(worker: tuple[str, float] | None) -> ProcessStatus:
    """A worker that `metaclaw start` did not start has no port; it is known by its heartbeat in the store."""
    if worker is None:
        return ProcessStatus("worker", "down", "", "not running")
    owner, at = worker
    age = max(0.0, time.time() - at)
    alive = age < HEARTBEAT_DEAD and not _ended_here(owner)
    return ProcessStatus("worker", "ready" if alive else "down", "", f"last at work {age:.0f} s ago")


def _ended_here(owner: str) -> bool:
    """Whether ``owner`` (host:pid:start in hundredths of a second) was a process of this machine and is gone."""
    host, _, rest = owner.partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname()[:24] or not (pid.isdigit() and started.isdigit()):
        return False
    return not same_process(int(pid), int(started) / 100)


def _process(name: str, service: ServiceState | None, answer: Answer | None, url: str) -> ProcessStatus:
    if service is None:
        up = answer is not None and answer.status is not None
        return ProcessStatus(name, "ready" if up else "down", url, (answer.problem or "") if answer else "")
    state = service.phase
    detail = service.detail
    if state == "ready" and answer is not None and answer.problem is not None:
        detail = answer.problem
    seconds = max(0.0, time.time() - service.since)
    return ProcessStatus(name, state, url, detail, service.pid, service.restarts, seconds)


def _trainer_view(answer: Answer | None) -> TrainerView:
    if answer is None:
        return TrainerView({}, "is not configured (metaclaw.mode is neither rl nor auto)")
    if answer.status == 401:
        return TrainerView({}, "refuses our key: check metaclaw.rl.remote_api_key")
    if answer.problem is not None:
        return TrainerView({}, f"is {answer.problem}" if answer.problem == "not running" else answer.problem)
    agents = answer.body.get("agents") if isinstance(answer.body, dict) else None
    if not isinstance(agents, list) or not all(isinstance(agent, dict) for agent in agents):
        return TrainerView({}, "gave an answer that cannot be read; is it of another version?")
    return TrainerView({str(agent.get("agent")): agent for agent in agents})


def _agent(agent: StoredAgent, settings: Settings, trainer: TrainerView, worker_problem: str | None) -> AgentStatus:
    mode = agent.mode or settings.mode.value
    there = trainer.agents.get(agent.name)
    return AgentStatus(
        name=agent.name,
        mode=mode,
        version=agent.version,
        traces=agent.traces,
        waiting=agent.unscored + agent.unforwarded,
        queued=int(there["queued"]) if there and "queued" in there else None,
        batch_size=int(there["batch_size"]) if there and "batch_size" in there else None,
        trained=agent.trained,
        why=why_not_training(agent, mode, settings.rl.enabled, trainer, worker_problem),
    )
