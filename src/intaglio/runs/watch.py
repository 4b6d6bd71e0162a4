"""A page that shows a run while it trains. It is served to this machine alone, and reads the run's folder and no more.

Who may ask: a page of elsewhere cannot read the answers, since none allows another origin. Names that lead here are
refused unless they are this machine's own, or a foreign name that is bound to it anew (DNS rebinding) could read them.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from intaglio.errors import InputError
from intaglio.measure.render import finite
from intaglio.measure.watch_page import Watched, page, rendered

PORT = 8420
OWN_NAME = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)  # ssh forwards any port to ours
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; script-src 'nonce-{nonce}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def watch(run_dir: str | Path, *, port: int = PORT, on_start: Callable[[str], None] = print) -> None:
    """Serve the page of a run at http://localhost:PORT until Ctrl-C. on_start: is told the address.

    run_dir: of `train`, `train-drafter` or `demo`; it may have begun, ended or be finished. port: 0 for any that is
    free. Raises InputError for a folder without a run and for a port that is taken, ConfigError for a damaged run.
    """
    with serve(run_dir, port) as server:
        on_start(f"http://localhost:{server.server_port} shows {run_dir}. Ctrl-C ends it.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def serve(run_dir: str | Path, port: int) -> ThreadingHTTPServer:
    """The server of `watch`, which does not serve yet."""
    watched = Watched(Path(run_dir))
    watched.look()  # what is damaged now is an error, and later a line on the page

    class Bound(Handler):
        run, nonce, lock = watched, secrets.token_urlsafe(16), threading.Lock()

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Bound)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port}: cannot be served: {error}: choose another with --port, 0 for any") from error


class Handler(BaseHTTPRequestHandler):
    """Answers for the page and its JSON, and for nothing else."""

    run: Watched
    nonce: str
    lock: threading.Lock
    timeout = 10  # seconds in which a request must come
    server_version, sys_version = "intaglio", ""

    def do_GET(self) -> None:
        """Answer the page or its JSON."""
        if not OWN_NAME.fullmatch(self.headers.get("Host", "")):
            return self._answer(403, "text/plain", "this page is for this machine alone: ask for it as localhost\n")
        path = urlsplit(self.path).path
        if path not in ("/", "/state.json"):
            return self._answer(404, "text/plain", "there are / and /state.json\n")
        with self.lock:  # one look at a time, since each may read whole logs
            if path == "/":
                self._answer(200, "text/html", page(self.run, self.nonce))
            else:
                self._answer(200, "application/json", json.dumps(finite(rendered(self.run))))

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": POLICY.format(nonce=self.nonce),
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of each request."""
