"""Servers for the tests of this folder: one for each test, and one for those of a file that change nothing."""

import pytest

from tests.serving import examples


@pytest.fixture
def serve():
    running = []

    def serve(engine=None, **kwargs) -> examples.Server:
        running.append(examples.Server(engine or examples.saying(examples.ANSWER), **kwargs))
        return running[-1]

    yield serve
    for server in running:
        server.engine.hold.clear()
        server.stop()


@pytest.fixture(scope="module")
def shared():
    server = examples.Server(examples.saying(examples.ANSWER))
    yield server
    server.stop()
