"""Runs a service until it is told to stop: binding, signals, a stop that lets answers end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence

from absl import logging
from aiohttp import web

from moe_vlm_jax import origins
from moe_vlm_jax.serving import service as service_lib

_CLOSING_SECONDS = 5.0  # for what is left to send once decoding has ended
_BACKLOG = 1024  # connections that wait to be accepted: a refusal in HTTP says more than a refused connection


class Interruptions:
    """How often somebody asked the server to stop.

    The first time, nothing new is answered and what runs gets its time; the second time ends that, too.
    """

    def __init__(self):
        self.count = 0

    def add(self) -> None:
        """Asks once more."""
        self.count += 1


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Args:
      host: address to bind.
      port: 0 takes a free one.

    Raises:
      ValueError: the address cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port} ({error}); give another --host or --port.") from error


def run(service: service_lib.Service, listening: socket.socket, *, grace: float, started: Callable[[str], None]) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status, 1 where decoding failed.

    Args:
      service: what is served; closed at the end.
      listening: from `listen`; closed at the end.
      grace: seconds that running requests get after the first signal.
      started: called with the URL.
    """

    async def until_signal() -> None:
        loop, interruptions = asyncio.get_running_loop(), Interruptions()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, interruptions.add)
        try:
            await serve(service, listening, grace=grace, started=started, interruptions=interruptions)
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    asyncio.run(until_signal())
    return int(service.failed)


async def serve(
    service: service_lib.Service,
    listening: socket.socket,
    *,
    grace: float,
    started: Callable[[str], None],
    interruptions: Interruptions,
) -> None:
    """Serves until it is interrupted or decoding failed; see `run`."""
    address, port = listening.getsockname()[:2]
    runner = web.AppRunner(
        service.app(origins.url_of(address, port)),
        handler_cancellation=True,  # a client that goes away gives its request up
        auto_decompress=False,  # a small body must not become a large one
        access_log=None,
        shutdown_timeout=_CLOSING_SECONDS,
    )
    try:
        await runner.setup()
        site = web.SockSite(runner, listening)
        await site.start()
        started(origins.url_of(address, port))
        while not interruptions.count and not service.failed:
            await asyncio.sleep(0.05)
        service.stopping = True
        logging.info("stopping; %d requests run", service.num_busy)
        await site.stop()
        drained = asyncio.create_task(service.drain(0 if service.failed else grace))
        while not drained.done() and interruptions.count < 2:
            await asyncio.sleep(0.02)
        drained.cancel()
        # In a thread: what still runs is told so by calls into this loop.
        await asyncio.to_thread(service.close)
        await service.drain(_CLOSING_SECONDS)
    finally:
        await asyncio.to_thread(service.close)
        await runner.cleanup()
        listening.close()


def guard_of(listening: socket.socket, host: str, names: Sequence[str]) -> origins.Guard:
    """Returns the guard of a server.

    Args:
      listening: its socket.
      host: as it was given to `listen`.
      names: further ones by which requests may call this host.
    """
    return origins.Guard(host, listening.getsockname()[0], names)
