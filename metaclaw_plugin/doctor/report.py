"""Everything that the doctor looks at, in order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from metaclaw_plugin.doctor.agreement import look_at_agreement
from metaclaw_plugin.doctor.configuration import look_at_configuration
from metaclaw_plugin.doctor.finding import Finding
from metaclaw_plugin.doctor.machine import look_at_machine
from metaclaw_plugin.doctor.services import look_at_services
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.supervisor.plan import trains


def examine(settings: Settings, config: Path | None) -> Iterator[Finding]:
    """Look at machine, configuration and services, one finding after the other; some seconds in all."""
    yield from look_at_machine(settings, config)
    yield from look_at_configuration(settings, config)
    yield from look_at_services(settings)
    if trains(settings):
        yield from look_at_agreement(settings)
