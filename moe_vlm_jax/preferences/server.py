"""The annotation page: one HTML file, and a server that this machine's browser alone can reach.

    GET /             the page; needs nothing from anywhere else
    GET /view         what to show, as JSON
    GET /image/I/J    image J of candidate I, by number: no request names a file
    POST /mark        {"item", "choice", "seconds"}: the mark is on the disk before the answer, which is the next view
    POST /undo        {"item"}

A foreign page must not make marks: requests must name this host and come from its page (origins.py), and posts must be
JSON.
"""

import http
import http.server
import importlib.resources
import io
import json
import re
import secrets
import socket
import sys
from collections.abc import Callable
from typing import Any

from absl import logging
from PIL import Image

from moe_vlm_jax import origins
from moe_vlm_jax.data import bad_samples, image_files, json_lines, messages
from moe_vlm_jax.preferences import annotate

_MAX_BODY = 65_536
_SHOWN_AS_IS = {"JPEG": "image/jpeg", "PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp", "BMP": "image/bmp"}
_IMAGE_PATH = re.compile(r"/image/([0-9]{1,9})/([0-9]{1,9})")


class Server(http.server.ThreadingHTTPServer):
    """Serves the page of one session."""

    daemon_threads = True

    def __init__(self, session: annotate.Session, host: str, port: int):
        """Binds the address; `serve_forever` serves.

        Args:
          session: what is annotated.
          host: address to bind; origins.LOOPBACK unless others shall reach the page.
          port: 0 takes a free one.

        Raises:
          ValueError: the address cannot be had.
        """
        self.session = session
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"cannot listen on {host}, port {port} ({error}); give another --host or --port."
            ) from error
        self.guard = origins.Guard(host, str(self.server_address[0]))

    def handle_error(self, request, client_address) -> None:
        """Passes over clients that went away; a page that is closed while an image loads is no fault."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return origins.url_of(str(self.server_address[0]), self.server_address[1])


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = 60  # seconds; a stuck client holds a thread no longer

    def do_GET(self) -> None:
        if not self._allowed():
            return
        path = self.path.split("?", 1)[0]
        if path == "/":
            self._send_page()
        elif path == "/view":
            self._answer(self._send_view)
        elif found := _IMAGE_PATH.fullmatch(path):
            self._send_image(int(found[1]), int(found[2]))
        else:
            self._send_error(http.HTTPStatus.NOT_FOUND, "there is no such page.")

    def do_POST(self) -> None:
        # Read before anything is refused: closing a connection with unread data can destroy the answer on its way.
        length = self.headers.get("Content-Length") or ""
        honest = length.isdecimal() and len(length) < 10
        sent = self.rfile.read(min(int(length), 16 * _MAX_BODY)) if honest else None
        if not self._allowed():
            return
        if (self.headers.get("Content-Type") or "").split(";")[0].strip().lower() != "application/json":
            return self._send_error(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a post must be JSON.")
        if sent is None or len(sent) > _MAX_BODY:
            return self._send_error(http.HTTPStatus.BAD_REQUEST, f"a post needs a length of at most {_MAX_BODY}.")
        self._answer(lambda: self._act(json.loads(sent)))

    def log_message(self, format: str, *args) -> None:
        logging.debug(format, *args)

    def _answer(self, send: Callable[[], None]) -> None:
        """Sends an answer, or what is wrong in its place."""
        try:
            send()
        except annotate.OutdatedError as error:
            self._send_error(http.HTTPStatus.CONFLICT, str(error))
        except ValueError as error:
            self._send_error(http.HTTPStatus.BAD_REQUEST, str(error))
        except ConnectionError:
            raise  # the client went away: nobody is left to tell
        except OSError as error:
            logging.error("the file of marks cannot be used: %s", error)
            self._send_error(http.HTTPStatus.INTERNAL_SERVER_ERROR, f"the mark was not saved: {error}.")

    def _act(self, body: Any) -> None:
        body = body if isinstance(body, dict) else {}
        session, item, seconds = self.server.session, body.get("item"), body.get("seconds", 0)
        if not isinstance(item, str) or not isinstance(seconds, int | float):
            raise ValueError(f"item={item!r}, seconds={seconds!r} are not a text and a number; load the page again.")
        if self.path == "/mark":
            session.mark(item, str(body.get("choice")), seconds)
        elif self.path == "/undo":
            session.undo(item)
        else:
            return self._send_error(http.HTTPStatus.NOT_FOUND, "nothing can be posted here.")
        self._send_view()

    def _allowed(self) -> bool:
        refusal = self.server.guard.refusal(self.headers.get, self.path, self.server.url)
        if refusal:
            self._send_error(*refusal)
        return refusal is None

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        text = importlib.resources.files("moe_vlm_jax.preferences").joinpath("page.html").read_text(encoding="utf-8")
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src 'self' data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = text.replace("NONCE", nonce).encode()
        self._send(http.HTTPStatus.OK, "text/html; charset=utf-8", page, {"Content-Security-Policy": policy})

    def _send_view(self) -> None:
        session = self.server.session
        view = session.view()
        shown: dict = {"annotator": session.annotator, "done": view.done, "total": view.total, "last": view.last}
        if view.index is None:
            shown["report"] = session.report()
        else:
            item = session.candidates[view.index]
            shown["item"] = {
                "id": item.id,
                "images": [f"/image/{view.index}/{j}" for j in range(len(item.images))],
                "turns": [{"role": turn.role, "text": messages.without_marks(turn.text)} for turn in item.turns],
                "left": view.left,
                "right": view.right,
            }
        self._send_json(http.HTTPStatus.OK, shown)

    def _send_image(self, index: int, number: int) -> None:
        found = self.server.session.candidates
        if index >= len(found) or number >= len(found[index].images):
            return self._send_error(http.HTTPStatus.NOT_FOUND, "no candidate has such an image.")
        try:
            encoded = image_files.read(found[index].images[number])
            kind = image_files.format_of(encoded, found[index].id)
            if kind not in _SHOWN_AS_IS:
                encoded, kind = _as_png(encoded), "PNG"
        except (OSError, bad_samples.SampleError) as error:
            logging.error("image %d of candidate %d cannot be shown: %s", number, index, error)
            return self._send_error(http.HTTPStatus.INTERNAL_SERVER_ERROR, f"the image cannot be shown: {error}")
        self._send(http.HTTPStatus.OK, _SHOWN_AS_IS[kind], encoded, {})

    def _send_error(self, status: http.HTTPStatus, message: str) -> None:
        self._send_json(status, {"error": message})

    def _send_json(self, status: http.HTTPStatus, value: dict) -> None:
        self._send(status, "application/json", json_lines.text_of(value).encode(), {})

    def _send(self, status: http.HTTPStatus, kind: str, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        fixed = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        for name, value in (fixed | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _as_png(encoded: bytes) -> bytes:
    """Returns the picture as a file that browsers show."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(encoded)) as image:
        image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
