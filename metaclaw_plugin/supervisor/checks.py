"""What is looked at before anything is started: ports and disk."""

from __future__ import annotations

import errno
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.supervisor.plan import Service

MIN_FREE = 500 * 2**20  # bytes


def check_disk(home: Path, least: int = MIN_FREE) -> None:
    """Raise ``ProcessError`` if the disk of ``home`` has less than ``least`` bytes left."""
    free = shutil.disk_usage(home).free
    if free < least:
        raise ProcessError(
            f"only {free // 2**20} MiB are free on the disk of {home}, {least // 2**20} MiB are needed; "
            "free some, or set METACLAW_HOME to another disk"
        )


def check_ports(services: Iterable[Service]) -> None:
    """Raise ``ProcessError`` for the first service whose port another program has, or that two of them share."""
    seen: dict[int, str] = {}
    for service in services:
        if service.port is None:
            continue
        if service.port in seen:
            raise ProcessError(
                f"{seen[service.port]} and {service.name} both want port {service.port}; change {service.port_setting}"
            )
        seen[service.port] = service.name
        _check_port(service, service.port)


def _check_port(service: Service, port: int) -> None:
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((service.host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ProcessError(
                    f"port {port} of the {service.name} is taken{_holder(port)}; "
                    f"stop that program or change {service.port_setting}"
                ) from error
            where = f"{service.host}:{port}"
            raise ProcessError(f"the {service.name} cannot listen on {where}: {error.strerror}") from error


def _holder(port: int) -> str:
    """Which process listens there, as far as this user may know."""
    try:
        for connection in psutil.net_connections("inet"):
            listens = connection.status == psutil.CONN_LISTEN and getattr(connection.laddr, "port", None) == port
            if listens and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())[:80]
                return f" by process {connection.pid} ({command})"
    except psutil.Error:
        return ""
    return ""
