"""What the trainer counts for Prometheus. Gauges of queue and vLLM are read from the store when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from metaclaw_hooks.wire import AgentStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.reconcile import ReplicaState
from metaclaw_trainer.sample_queue import PutResult


class Metrics:
    """The registry of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._samples = Counter(
            "metaclaw_trainer_samples", "Samples received, by what became of them.", ["outcome"], registry=self.registry
        )
        self._steps = Counter(
            "metaclaw_trainer_steps",
            "Batches taken up, by how they ended.",
            ["agent", "outcome"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "metaclaw_trainer_step_seconds",
            "Seconds from claim to version.",
            buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800),
            registry=self.registry,
        )
        self._last = Gauge(
            "metaclaw_trainer_step_metric",
            "A figure of the agent's last step.",
            ["agent", "name"],
            registry=self.registry,
        )

    def received(self, result: PutResult, malformed: int) -> None:
        """Count what one request brought."""
        self._samples.labels("accepted").inc(len(result.accepted))
        self._samples.labels("duplicate").inc(len(result.duplicate))
        self._samples.labels("refused").inc(len(result.refused) + malformed)
        self._samples.labels("no_room").inc(len(result.full))

    def stepped(self, agent: str, outcome: str, seconds: float) -> None:
        """Count one batch: ``outcome`` is trained, skipped or failed."""
        self._steps.labels(agent, outcome).inc()
        self._seconds.observe(seconds)

    def figures(self, agent: str, values: dict[str, float]) -> None:
        """Show the figures of the agent's last step."""
        for name, value in values.items():
            self._last.labels(agent, name).set(value)

    def watch(self, agents: AgentBook, replicas: Sequence[ReplicaState]) -> None:
        """Also show queues and vLLMs; ``replicas`` is a list that is kept up to date by its owner."""
        self.registry.register(_Live(agents, replicas))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Live(Collector):
    def __init__(self, agents: AgentBook, replicas: Sequence[ReplicaState]) -> None:
        self._agents = agents
        self._replicas = replicas

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # so that registering asks no database

    def collect(self) -> Iterator[GaugeMetricFamily]:
        statuses = self._agents.statuses()
        for name, text, value in (
            ("queued", "Samples waiting.", lambda s: s.queued),
            ("set_aside", "Samples that will not be trained.", lambda s: s.set_aside),
            ("trained", "Samples trained on.", lambda s: s.trained),
            ("head", "Version that the next step starts from.", lambda s: s.head),
            ("step", "Optimiser steps taken.", lambda s: s.step),
            ("training", "1 while a step is running.", lambda s: int(s.training)),
        ):
            yield _by_agent(name, text, [(s, float(value(s))) for s in statuses])
        held = GaugeMetricFamily("metaclaw_trainer_vllm_adapters", "Adapters of ours in a vLLM.", labels=["url"])
        up = GaugeMetricFamily("metaclaw_trainer_vllm_up", "1 if the vLLM answered last.", labels=["url"])
        for replica in list(self._replicas):
            held.add_metric([replica.url], float(len(replica.held)))
            up.add_metric([replica.url], float(replica.reachable))
        yield held
        yield up


def _by_agent(name: str, text: str, values: list[tuple[AgentStatus, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"metaclaw_trainer_agent_{name}", text, labels=["agent"])
    for status, value in values:
        family.add_metric([status.agent], value)
    return family
