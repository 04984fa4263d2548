"""Serving goes first: the trainer's whole session has a lower priority."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AUTOGROUP = Path("/proc/self/autogroup")
GUARD = [sys.executable, "-m", "metaclaw_plugin.supervisor.guard"]


@pytest.mark.skipif(not AUTOGROUP.exists(), reason="this kernel does not schedule by session")
@pytest.mark.parametrize("niceness", [0, 10])
def test_the_guard_lowers_its_whole_session(niceness: int) -> None:
    show = [sys.executable, "-c", f"print(open({str(AUTOGROUP)!r}).read())"]
    done = subprocess.run(
        [*GUARD, "--session-nice", str(niceness), "--", *show],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
    )
    assert done.stdout.split()[-2:] == ["nice", str(niceness)]
