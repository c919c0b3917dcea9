"""A store of objects in memory that speaks as much of S3 as a tier needs, and checks nobody's signature.

Faster than any real one, so that a measurement shows clients and not servers; and one whose objects can be damaged at rest.
``python -m perf.memory_store PORT`` serves until it is killed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading

_HEAD_BYTES = 1 << 14


class MemoryStore:
    """``objects`` maps paths to bytes. ``context`` is for TLS."""

    def __init__(self, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self.objects: dict[str, bytes | bytearray] = {}
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """For ever."""
        self._acceptor.join()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._listener.close()
        for sock in list(self._connections):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._connections.add(sock)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        rest = b""
        self._connections.discard(plain := sock)
        with contextlib.suppress(OSError):
            sock = self._context.wrap_socket(sock, server_side=True) if self._context is not None else sock
        self._connections.add(sock)
        with plain, sock, contextlib.suppress(OSError, ValueError, LookupError):
            while True:
                while b"\r\n\r\n" not in rest:
                    more = sock.recv(_HEAD_BYTES)
                    if not more or len(rest) > _HEAD_BYTES:
                        return
                    rest += more
                head, _, rest = rest.partition(b"\r\n\r\n")
                first, *fields = head.decode("latin-1").split("\r\n")
                method, target, _ = first.split(" ")
                path = target.partition("?")[0]
                if method == "PUT":
                    rest = self._put(sock, path, fields, rest)
                elif method == "DELETE":
                    self.objects.pop(path, None)
                    sock.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
                else:
                    self._get(sock, path, method == "GET")
        self._connections.discard(sock)

    def _put(self, sock: socket.socket, path: str, fields: list[str], rest: bytes) -> bytes:
        """Stores a body, and gives what came behind it."""
        said = {name.lower(): value for name, _, value in (field.partition(":") for field in fields)}
        length = int(said["content-length"])
        if said.get("expect", "").strip().lower() == "100-continue":
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray(length)
        view = memoryview(body)
        done = min(length, len(rest))
        view[:done] = rest[:done]
        while done < length:
            count = sock.recv_into(view[done:])
            if not count:
                raise OSError("a body without its end")  # which is no object
            done += count
        self.objects[path] = body
        sock.sendall(b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: 0\r\n\r\n')
        return rest[length:]

    def _get(self, sock: socket.socket, path: str, with_body: bool) -> None:
        body = self.objects.get(path)
        if body is None:
            text = b"<Error><Code>NoSuchKey</Code></Error>"
            sock.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n" % len(text) + (text if with_body else b""))
            return
        head = b"HTTP/1.1 200 OK\r\nETag: \"x\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: %d\r\n\r\n"
        if not with_body:
            sock.sendall(head % len(body))
            return
        sock.sendall(head % len(body))
        sock.sendall(body)


if __name__ == "__main__":
    MemoryStore(int(sys.argv[1])).wait()
