"""Who may talk to a server on this machine: itself, by one of its names, and no page of another site.

A browser runs pages of strangers beside ours. They can send requests here, and a name of theirs can be made to point
here (DNS rebinding); a request is answered only if it names this host and comes from no other page.
"""

import http
import ipaddress
import socket
import urllib.parse
from collections.abc import Callable, Sequence

LOOPBACK = "127.0.0.1"


class Guard:
    """Says which requests to refuse, for a server at one address."""

    def __init__(self, host: str, address: str, names: Sequence[str] = ()):
        """Keeps the names.

        Args:
          host: as it was given to bind.
          address: as it was bound, a number.
          names: by which the server is known, too.
        """
        self._address = ipaddress.ip_address(address)
        known = ("localhost", host, socket.gethostname(), *names)
        self._names = {name.lower() for name in known} - {""}

    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self._address.is_loopback

    def is_this_host(self, header: str) -> bool:
        """Whether a Host header names this server; a name that a stranger could point here does not."""
        try:
            name = urllib.parse.urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.is_loopback()

    def refusal(self, header: Callable[[str], str | None], path: str, url: str) -> tuple[http.HTTPStatus, str] | None:
        """Returns (status, message) for a request that is refused, else None.

        Args:
          header: gives the request's header of a name, or None.
          path: of the request; '/' is a page, to which other sites may lead.
          url: where the server is, for the message.
        """
        host, origin = header("Host") or "", header("Origin")
        if not self.is_this_host(host):
            return http.HTTPStatus.MISDIRECTED_REQUEST, f"host {host!r} is not this one; open {url} instead."
        if origin is not None and origin.split("://", 1)[-1] != host:
            return http.HTTPStatus.FORBIDDEN, f"requests from {origin!r} are refused; use this page."
        if path != "/" and header("Sec-Fetch-Site") not in ("same-origin", "none", None):
            return http.HTTPStatus.FORBIDDEN, "requests from other sites are refused; open the page itself."
        return None


def url_of(host: str, port: int) -> str:
    """Returns the address of a server's page."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
