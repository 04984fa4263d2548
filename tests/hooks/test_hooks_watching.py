"""The folder of plugins is read again while a process runs, and what plugins did is passed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from metaclaw_hooks.plugins import HookStats, Plugins, create_plugin_manager
from metaclaw_hooks.watching import FolderWatch

from tests.hook_nouns import make_session, make_trace

Figures = Mapping[tuple[str, str], HookStats]


class Watched:
    """Plugins under watch, and what was reported of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plugins: Plugins = create_plugin_manager(folder, 5.0, packages=False)
        self.reported: list[Figures] = []
        self.listener_away = False
        self.watch = FolderWatch(self.plugins, interval=0.02, report=self._report, report_every=0.02)
        self.watch.start()

    def _report(self, fresh: Figures) -> None:
        self.reported.append(fresh)
        if self.listener_away:
            raise OSError("away")

    def write(self, name: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text, encoding="utf-8")

    def score(self) -> list[float]:
        trace = make_trace()
        found = self.plugins.call_blocking("score_trace", trace=trace, next_trace=None, session=make_session(trace))
        return [reward.value for _, reward in found]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    stage = Watched(tmp_path / "hooks")
    yield stage
    stage.watch.stop()
    stage.plugins.close()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_dropped_into_a_folder_that_was_not_there_is_picked_up(watched: Watched) -> None:
    assert watched.score() == []
    watched.write("mine.py", "def score_trace(trace): return 0.25\n")
    wait_until(lambda: watched.score() == [0.25])
    watched.write("mine.py", "def score_trace(trace): return 0.125\n")
    wait_until(lambda: watched.score() == [0.125])


def test_a_folder_that_cannot_be_listed_leaves_what_is_loaded_in_force(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watched.write("mine.py", "def score_trace(trace): return 0.25\n")
    wait_until(lambda: watched.score() == [0.25])
    real = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path == watched.folder:
            raise PermissionError(13, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)  # tests may run as root, whom no mode of a folder keeps out
        wait_until(lambda: "Permission denied" in watched.plugins.problems.get(str(watched.folder), ""))
        assert watched.score() == [0.25]
    wait_until(lambda: watched.plugins.problems == {})
    assert caplog.text.count("Permission denied") == 1, "it is told once"


def test_what_plugins_did_is_reported_once_though_the_listener_fails(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    watched.write("mine.py", "def score_trace(trace): return 0.25\n")
    wait_until(lambda: watched.score() == [0.25])
    wait_until(lambda: bool(watched.reported))
    watched.listener_away = True
    told = len(watched.reported)
    watched.score()
    wait_until(lambda: len(watched.reported) > told)
    watched.listener_away = False
    wait_until(lambda: "could not be counted" in caplog.text)
    before = len(watched.reported)
    watched.score()
    wait_until(lambda: len(watched.reported) > before)
    assert watched.reported[-1]["mine", "score_trace"].calls == 1


def test_what_was_not_reported_is_reported_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score_trace(trace): return 0.25\n")
    plugins = create_plugin_manager(tmp_path, 5.0, packages=False)
    reported: list[Figures] = []
    watch = FolderWatch(plugins, report=reported.append)
    watch.start()
    trace = make_trace()
    plugins.call_blocking("score_trace", trace=trace, next_trace=None, session=make_session(trace))
    watch.stop()
    assert [figures["mine", "score_trace"].calls for figures in reported] == [1]
