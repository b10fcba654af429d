"""Another user of the machine: `python strangers.py` becomes this user, tries every given socket, and reports.

It reads the sockets from standard input and answers on standard output, both in JSON. It has no key. Requests as of a
browser on another site's page have an Origin. HTTP/2 is tried in the clear, and over TLS without a certificate.
"""

from __future__ import annotations

import base64
import contextlib
import encodings.idna  # noqa: F401 (what a connection loads at its first use: the other user may not reach the library)
import itertools
import json
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from typing import Any

NOBODY = 65534
ORIGIN = "http://evil.example"
_TIMEOUT_SECONDS = 2.0  # of silence
_MOST_BYTES = 2**20
_METHODS = ("GET", "OPTIONS", "PUT", "POST", "DELETE")
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _HEADERS, _DATA = 4, 1, 0


def main() -> None:
    asked = json.load(sys.stdin)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    answers = [answer for door in asked["doors"] for answer in ask_door(door, asked["paths"], asked["calls"])]
    json.dump(answers, sys.stdout)


def ask_door(door: str | list[Any], paths: list[str], calls: list[list[str]]) -> Iterator[dict[str, str]]:
    """Yield what a door answers to each request. One that lets nobody in answers nothing."""
    for is_tls in (False, True) if speaks_tls(door) else (False,):
        for method, path, origin in itertools.product(_METHODS, paths, ("", ORIGIN)):
            answer = exchange(door, http_request(method, path, origin), is_tls=is_tls)
            yield {"door": str(door), "asked": f"{method} {path} {origin}".strip(), "answer": answer.decode("latin-1")}
        for path, message in calls:
            answer = grpc_data(exchange(door, grpc_request(path, base64.b64decode(message)), is_tls=is_tls))
            yield {"door": str(door), "asked": f"gRPC {path}", "answer": answer.decode("latin-1")}


def speaks_tls(door: str | list[Any]) -> bool:
    try:
        with connect(door) as plain, secured(plain, is_tls=True):
            return True
    except OSError:
        return False


def http_request(method: str, path: str, origin: str) -> bytes:
    body = b"" if method in ("GET", "OPTIONS") else b"overwritten"
    headers = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: text/plain"]
    headers += [f"Content-Length: {len(body)}", *([f"Origin: {origin}"] if origin else [])]
    if method == "OPTIONS":
        headers.append("Access-Control-Request-Method: PUT")
    return "\r\n".join([*headers, "", ""]).encode() + body


def grpc_request(path: str, message: bytes) -> bytes:
    """One unary call: connection preface, headers without compression, one message."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "127.0.0.1"}
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in fields.items())
    body = b"\0" + len(message).to_bytes(4, "big") + message
    return _PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_HEADERS, 4, 1, block) + _frame(_DATA, 1, 1, body)


def grpc_data(answer: bytes) -> bytes:
    """Return the messages in what an HTTP/2 server sent."""
    data = b""
    while len(answer) >= 9:
        length = int.from_bytes(answer[:3], "big")
        if answer[3] == _DATA:
            data += answer[9 : 9 + length]
        answer = answer[9 + length :]
    return data


def exchange(door: str | list[Any], request: bytes, *, is_tls: bool) -> bytes:
    """Send a request and return what comes until the door closes, or falls silent."""
    received = b""
    with contextlib.suppress(OSError), connect(door) as plain, secured(plain, is_tls=is_tls) as connection:
        connection.sendall(request)
        while chunk := connection.recv(65536):
            received += chunk
            if len(received) > _MOST_BYTES or is_over(received):
                break
    return received


def is_over(received: bytes) -> bool:
    """Return whether an HTTP/2 call has its trailers: the connection would stay open."""
    rest = received
    while len(rest) >= 9:
        if rest[3] == _HEADERS and rest[4] & 1:
            return True
        rest = rest[9 + int.from_bytes(rest[:3], "big") :]
    return False


def connect(door: str | list[Any]) -> socket.socket:
    if isinstance(door, str):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_TIMEOUT_SECONDS)
        connection.connect(door)
        return connection
    return socket.create_connection((door[0], door[1]), timeout=_TIMEOUT_SECONDS)


def secured(plain: socket.socket, *, is_tls: bool) -> socket.socket:
    if not is_tls:
        return plain
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(plain)


def _text(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


if __name__ == "__main__":
    main()
