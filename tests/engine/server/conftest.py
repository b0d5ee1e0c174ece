"""One world for all tests, and one server for those that leave it as it was."""

import pytest

from tests.engine.server.world import World, running


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def shared(world):
    with running(world.server()) as process:
        yield process


@pytest.fixture(scope="session")
def client(shared):
    return shared.client()
