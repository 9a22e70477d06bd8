"""What hands out credentials on a node of EKS, by its protocol: a service account's token in, temporary keys out."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer


@contextlib.contextmanager
def credentials_agent(token: str, access_key: str, secret_key: str) -> Iterator[str]:
    """The address that gives the keys to who shows the token."""
    keys = {
        "AccessKeyId": access_key,
        "SecretAccessKey": secret_key,
        "Token": "",
        "Expiration": "2999-01-01T00:00:00Z",
    }

    class Agent(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == token
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(json.dumps(keys).encode() if known else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Agent)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
