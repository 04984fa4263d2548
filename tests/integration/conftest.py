"""The gateway and plain LiteLLM in front of one upstream that replays, started once for all tests here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.gateway_server import GatewayServer, running_gateway, running_plain_litellm
from tests.replay_upstream import ReplayUpstream


@pytest.fixture(scope="session")
def replay() -> Iterator[ReplayUpstream]:
    with ReplayUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="session")
def gateway(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayServer]:
    """Ours. Skills are off, so that prompts are the client's own."""
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, replay.url, free_port(), skills={"max_skills": 0}) as server:
        yield server


@pytest.fixture(scope="session")
def plain_litellm(
    replay: ReplayUpstream, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """LiteLLM alone, in front of the same upstream."""
    with running_plain_litellm(tmp_path_factory.mktemp("plain"), replay.url, free_port()) as url:
        yield url
