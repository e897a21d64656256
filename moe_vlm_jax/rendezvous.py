"""A roll call before the cluster forms: who comes, and do they mean the same cluster.

JAX's own client ends the process from C++ when the coordinator cannot be reached or somebody is missing, and does not
compare the numbers of processes. So process 0 first listens on the coordinator's port for one line of every other
process and answers each of them; what is wrong becomes one ValueError, the same on all that were reached.

    process i -> 0   {"process_id": 2, "num_processes": 4}
    0 -> process i   {"mistake": ""}
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

_RETRY_SECONDS = 0.2
_LINE_SECONDS = 10.0  # that somebody who has connected may take to say its line; the others wait meanwhile


def roll_call(address: str, *, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes have come; then JAX's coordinator may take the port.

    Args:
      address: host:port of process 0.
      num_processes: of the cluster, at least 2.
      process_id: of this process.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: the port is taken, nobody listens there, processes are missing, or they disagree.
    """
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _call(address, num_processes, timeout, deadline)
    else:
        _answer(address, num_processes, process_id, timeout, deadline)


def _call(address: str, num_processes: int, timeout: float, deadline: float) -> None:
    port = int(address.rpartition(":")[2])
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(address, port))
        present: dict[int, socket.socket] = {}
        mistake = ""
        while len(present) < num_processes - 1 and not mistake:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, num_processes) if i not in present)
                mistake = (
                    f"num_processes={num_processes}, but of these the processes {missing} did not come within "
                    f"{timeout:.0f} s; start them with the coordinator address {address}, look at their logs, or "
                    "raise --initialization_timeout."
                )
                continue
            try:
                connection.settimeout(max(0.01, min(_LINE_SECONDS, deadline - time.monotonic())))
                said = _receive(connection)
                other, count = int(said["process_id"]), int(said["num_processes"])
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # somebody else's, a port scan for instance
                continue
            mistake = _compare(other, count, present, num_processes)
            present.setdefault(other, connection)
            if mistake and present[other] is not connection:
                _send(connection, {"mistake": mistake})
        for connection in present.values():
            with contextlib.suppress(OSError):
                _send(connection, {"mistake": mistake})
        for connection in present.values():
            with contextlib.suppress(OSError):  # the other side closes first, so that no port is left waiting here
                connection.recv(1)
    if mistake:
        raise ValueError(mistake)


def _compare(other: int, count: int, present: dict[int, socket.socket], num_processes: int) -> str:
    if count != num_processes:
        return (
            f"process {other} was started with num_processes={count}, process 0 with num_processes={num_processes}; "
            "all processes of a cluster must be given the same number: start them all with the same."
        )
    if other in present or not 0 < other < num_processes:
        return (
            f"process_id={other} came twice or is not one of 0 ... {num_processes - 1}; every process needs its own "
            "number: look at how they are started, or end what is left of an earlier start."
        )
    return ""


def _answer(address: str, num_processes: int, process_id: int, timeout: float, deadline: float) -> None:
    host, _, port = address.rpartition(":")
    reason = ""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                _send(connection, {"process_id": process_id, "num_processes": num_processes})
                connection.settimeout(max(0.1, deadline - time.monotonic()) + 5)
                mistake = _receive(connection)["mistake"]
        except TimeoutError:
            reason = "it did not answer"
        except (OSError, ValueError, KeyError) as error:  # not there yet, or its name is not known yet
            reason = str(error)
        else:
            if mistake:
                raise ValueError(mistake)
            return
        time.sleep(_RETRY_SECONDS)
    raise ValueError(
        f"coordinator_address={address!r} was not reached from process {process_id} within {timeout:.0f} s ({reason}); "
        "process 0 must run there and the port must be open between the machines: start process 0, check the address, "
        "or raise --initialization_timeout."
    )


@contextlib.contextmanager
def _listen(address: str, port: int) -> Iterator[socket.socket]:
    """Listens on all addresses of this machine, as JAX's coordinator will."""
    dual = socket.has_dualstack_ipv6()
    try:
        server = socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise ValueError(
            f"coordinator_address={address!r}: process 0 cannot listen on port {port} ({error.strerror or error}); it "
            "must be free on the machine of process 0: choose another port."
        ) from error
    with server:
        yield server


def _send(connection: socket.socket, value: dict) -> None:
    connection.sendall(json.dumps(value).encode() + b"\n")


def _receive(connection: socket.socket) -> dict:
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > 65536:
            raise ValueError("the connection was closed before a whole line had come")
        line += part
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("not a line of the roll call")
    return value
