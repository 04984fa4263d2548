"""``make demo``: the whole loop on real parts, with two agents and opposite rewards. ``--help`` tells the options."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from demo.lesson import HELD_OUT, Lesson, LessonError, practise_together
from demo.measure import BaseModel
from demo.models import ROOT, ModelError, model_path
from demo.report import agent_report, draw_curves, exams, print_report, verdict, write_report
from demo.stage import AGENTS, BATCH_SIZE, Stage, set_stage
from demo.talk import Talker

METACLAW = [sys.executable, "-m", "metaclaw_plugin.cli.main"]
ROUNDS = 12  # of BATCH_SIZE interactions: 96 for each agent


class DemoError(RuntimeError):
    """The demo cannot go on; says why and what to do."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of {BATCH_SIZE} questions for each agent")
    parser.add_argument("--seed", type=int, default=0, help="order of the questions")
    parser.add_argument(
        "--shuffled", action="store_true", help="control: rewards that say nothing about the answers; nothing may rise"
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the report (runs/demo, runs/demo-shuffled)")
    return parser.parse_args()


def start_system(stage: Stage, console: Console) -> subprocess.Popen[str]:
    """`metaclaw start` as a child of ours; returns once everything is ready.

    Raises:
        DemoError: if it is not.
    """
    process = subprocess.Popen(
        [*METACLAW, "start", "--config", str(stage.config)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ready"):
            return process
        console.print(line.rstrip())
    raise DemoError(f"`metaclaw start` ended with {process.wait()}; its logs are in {stage.home / 'logs'}")


def stop_system(process: subprocess.Popen[str]) -> None:
    """End everything that was started; Ctrl-C has reached the child as well, so ask only once."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait()


def stop_leftover(folder: Path) -> None:
    """End what a killed demo left running in ``folder``."""
    config = folder / "config.yaml"
    if config.exists() and (folder / "home").exists():
        subprocess.run([*METACLAW, "stop", "--config", str(config)], capture_output=True, check=False, cwd=ROOT)


def add_agent(stage: Stage, name: str) -> str:
    """`metaclaw agents add NAME --json`; the new agent's key."""
    command = [*METACLAW, "agents", "add", name, "--json", "--config", str(stage.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise DemoError(f"agent {name} could not be added: {done.stderr.strip()}")
    key: str = json.loads(done.stdout)["key"]
    return key


def bars(console: Console) -> Progress:
    columns = TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def score_replies(model: Path, lessons: list[Lesson], console: Console) -> dict[str, tuple[float, float]]:
    """Log-likelihood of each agent's held-out replies under the base model, (before, after), in nats per token."""
    with bars(console) as progress:
        bar = progress.add_task(
            "likelihood under the base model", total=sum(len(e.replies) for one in lessons for e in exams(one))
        )
        base = BaseModel(model)
        found = {}
        for lesson in lessons:
            before, after = (exam.base_loglik(base, lambda: progress.advance(bar)) for exam in exams(lesson))
            found[lesson.agent] = (before, after)
    return found


async def run_lessons(lessons: list[Lesson], rounds: int, console: Console) -> None:
    """Examine, practise, examine again; progress bars all along."""
    with bars(console) as progress:

        async def examine(title: str) -> list[Any]:
            bar = progress.add_task(title, total=HELD_OUT * len(lessons))
            exams = [lesson.examine(lambda: progress.advance(bar)) for lesson in lessons]
            return list(await asyncio.gather(*exams))

        for lesson, exam in zip(lessons, await examine("held-out questions, before"), strict=True):
            lesson.before = exam
        tasks: dict[str, TaskID] = {
            lesson.agent: progress.add_task(f"{lesson.agent}: base model", total=rounds * BATCH_SIZE)
            for lesson in lessons
        }
        await practise_together(
            lessons,
            rounds,
            lambda agent: progress.advance(tasks[agent]),
            lambda agent, version: progress.update(tasks[agent], description=f"{agent}: {agent}@v{version} serves"),
        )
        for lesson, exam in zip(lessons, await examine("held-out questions, after"), strict=True):
            lesson.after = exam
    for lesson in lessons:
        await lesson.talker.close()


def run(options: argparse.Namespace, console: Console) -> int:
    """The whole demo; exit code 0 if everything was reached."""
    folder = (options.out or ROOT / "runs" / ("demo-shuffled" if options.shuffled else "demo")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with only_demo_in(folder):
        return run_in(folder, options, console)


@contextmanager
def only_demo_in(folder: Path) -> Iterator[None]:
    """Hold the folder: a second demo in it would end the first one's processes.

    Raises:
        DemoError: if another demo holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DemoError(
                f"another demo runs in {folder}; wait for it, or choose another folder with --out"
            ) from error
        yield


def run_in(folder: Path, options: argparse.Namespace, console: Console) -> int:
    """The whole demo in ``folder``."""
    stop_leftover(folder)
    model = model_path("smollm2-135m")
    stage = set_stage(folder, model, options.shuffled)
    began = time.monotonic()
    keys = {name: add_agent(stage, name) for name in AGENTS}
    process = start_system(stage, console)
    try:
        lessons = [
            Lesson(Talker(name, stage.gateway, key, stage.reward_file(name)), stage, key, options.seed + number)
            for number, (name, key) in enumerate(keys.items())
        ]
        asyncio.run(run_lessons(lessons, options.rounds, console))
    finally:
        stop_system(process)
    logliks = score_replies(model, lessons, console)
    report = {
        "agents": {lesson.agent: agent_report(lesson, logliks[lesson.agent]) for lesson in lessons},
        "seconds": round(time.monotonic() - began, 1),
        "shuffled": options.shuffled,
    }
    write_report(folder, report)
    draw_curves(folder / "curves.png", report)
    print_report(console, report)
    problems = verdict(report, options.shuffled)
    for problem in problems:
        console.print(f"[red]not reached:[/red] {problem}")
    console.print(f"report: {folder / 'report.json'}   curves: {folder / 'curves.png'}   data: {stage.home}")
    return 1 if problems else 0


def main() -> int:
    console = Console()
    try:
        return run(arguments(), console)
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except (DemoError, LessonError, ModelError, OSError) as error:
        Console(stderr=True).print(f"demo: {error}", highlight=False)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
