"""Where the counters of several gateway processes meet: mapped files, which a full disk would turn into SIGBUS."""

from __future__ import annotations

from pathlib import Path

import pytest

from metaclaw_plugin.errors import ProcessError
from metaclaw_plugin.gateway.command import METRICS_ENV, _metrics_folder, gateway_command
from metaclaw_plugin.settings import GatewaySettings, Settings


@pytest.mark.law(5)
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no file system in memory")
def test_they_are_not_on_the_disk_of_the_store(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, gateway=GatewaySettings(workers=2))
    _, env = gateway_command(settings, tmp_path / "config.yaml")
    folder = Path(env[METRICS_ENV])
    assert folder.stat().st_dev == Path("/dev/shm").stat().st_dev
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


def test_what_a_gateway_before_has_counted_is_gone(tmp_path: Path) -> None:
    for _ in range(2):
        folder = _metrics_folder(tmp_path / "home", tmp_path)
        assert folder.parent == tmp_path
        assert list(folder.iterdir()) == []
        (folder / "counter_1.db").write_bytes(b"x")


def test_two_homes_do_not_share_a_folder(tmp_path: Path) -> None:
    assert _metrics_folder(tmp_path / "a", tmp_path) != _metrics_folder(tmp_path / "b", tmp_path)


@pytest.mark.parametrize("hindrance", ["link", "none", "file"])
def test_where_it_cannot_be_trusted_the_home_is_used(tmp_path: Path, hindrance: str) -> None:
    memory, home = tmp_path / "shm", tmp_path / "home"
    if hindrance == "file":
        memory.write_text("no folder")
    elif hindrance == "link":
        memory.mkdir()
        place = _metrics_folder(home, memory)
        place.rmdir()
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    assert _metrics_folder(home, memory) == home / "gateway-metrics"


def test_a_home_that_cannot_hold_it_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ProcessError, match="check the permissions of METACLAW_HOME"):
        _metrics_folder(tmp_path / "home", tmp_path / "none")
