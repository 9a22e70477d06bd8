"""What a network and a busy store do: in front of a real server, connections that fail in the order given."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

_BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_CUT_AFTER = 100_000  # bytes of an answer

_ANSWERS = {"busy": _BUSY, "forbidden": _FORBIDDEN}


@contextlib.contextmanager
def faulty(endpoint: str, faults: Sequence[str]) -> Iterator[str]:
    """The endpoint of a relay to ``endpoint``. Of its requests, one each: ``busy`` is answered by 503, ``forbidden`` by
    403, the answer to
    ``cut`` breaks off, and ``""``, like all that come after these, gets its answer."""
    target = urlsplit(endpoint)
    assert target.hostname is not None
    address, left = (target.hostname, target.port or 80), list(faults)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener, address, left), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def _serve(listener: socket.socket, address: tuple[str, int], faults: list[str]) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            client, _ = listener.accept()
            fault = faults.pop(0) if faults else ""
            threading.Thread(target=_answer, args=(client, address, fault), daemon=True).start()


def _answer(client: socket.socket, address: tuple[str, int], fault: str) -> None:
    """One request, which has no body; the connection is then closed, so that each request is a connection."""
    with client, contextlib.suppress(OSError):
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(65536)
        if fault in _ANSWERS:
            client.sendall(_ANSWERS[fault])
            return
        head, rest = request.split(b"\r\n", 1)
        with socket.create_connection(address) as server:
            server.sendall(head + b"\r\nConnection: close\r\n" + rest)
            sent = 0
            while content := server.recv(65536):
                client.sendall(content)
                sent += len(content)
                if fault == "cut" and sent > _CUT_AFTER:
                    return
