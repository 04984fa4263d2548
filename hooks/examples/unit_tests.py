"""Runs the Python code of a reply against tests of yours: 1 if they pass, -1 if they fail, no opinion without code.

The tests are in the file that METACLAW_UNIT_TESTS names; they import the reply's code as ``answer``. The code runs in
a process of its own, in an empty folder, for a minute at most. That is no sandbox: let only agents that you trust
be judged so, or start the worker in a container.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOOK_TIMEOUT = 90.0  # seconds; the default suits quicker hooks
CODE = re.compile(r"```(?:python|py)\n((?:(?!```).)*)```", re.DOTALL)


def score_trace(trace):
    tests, blocks = os.environ.get("METACLAW_UNIT_TESTS"), CODE.findall(trace.response_text)
    if not tests or not blocks:
        return None
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "answer.py").write_text("\n".join(blocks), encoding="utf-8")
        shutil.copy(tests, Path(folder, "test_answer.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_answer.py"]
        environment = {"PATH": os.environ.get("PATH", ""), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        try:
            done = subprocess.run(command, cwd=folder, timeout=60, env=environment, capture_output=True, check=False)
        except subprocess.TimeoutExpired:
            return -1.0
    return {0: 1.0, 1: -1.0}.get(done.returncode)
