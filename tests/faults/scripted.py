"""The scripted faults, in the order of the list."""

from __future__ import annotations

from tests.faults import on_clocks, on_files, on_processes, on_wires
from tests.faults.fault_list import FAULTS, Fault

__all__ = ["FAULTS", "Fault", "on_clocks", "on_files", "on_processes", "on_wires"]
