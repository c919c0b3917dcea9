"""A proxy that misbehaves on purpose: it cuts, resets, stalls, drips, flips, inserts and drops what passes through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

KINDS = ("cut", "reset", "stall", "drip", "flip", "insert", "drop")
_CHUNK = 1 << 16


@dataclass
class Fault:
    """What happens once, after ``after`` bytes of one direction have passed since it was armed.

    ``cut`` and ``reset`` end the connection there, ``stall`` lets nothing more through until the fault is disarmed, ``drip``
    one byte every ``seconds``; ``flip`` turns bits of one byte, ``insert`` and ``drop`` add and lose ``size`` bytes.
    """

    kind: str
    after: int = 0
    to_server: bool = False
    size: int = 1
    seconds: float = 0.01
    fired: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    seen: int = 0


class Proxy:
    """Passes connections on to a port of this machine."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._fault: Fault | None = None
        self._refuses = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def arm(self, fault: Fault) -> Fault:
        self.disarm()
        with self._lock:
            self._fault = fault
        return fault

    def disarm(self) -> None:
        with self._lock:
            fault, self._fault = self._fault, None
        if fault is not None:
            fault.over.set()

    def refuse(self, refuses: bool) -> None:
        """Whether new connections are hung up on at once."""
        self._refuses = refuses

    def hang_up(self) -> None:
        """Ends all connections there are."""
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.disarm()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in list(self._threads):
            thread.join(10)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._refuses:
                    raise OSError
                server = socket.create_connection(("127.0.0.1", self.upstream), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            for sock in (client, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            pair = _Pair(client, server)
            self._start(self._pump, pair, False)
            self._start(self._pump, pair, True)

    def _pump(self, pair: _Pair, to_server: bool) -> None:
        source, sink = (pair.client, pair.server) if to_server else (pair.server, pair.client)
        try:
            while data := source.recv(_CHUNK):
                self._pass(data, sink, to_server, pair)
        except OSError:
            pass
        finally:
            for sock in (pair.client, pair.server):
                with contextlib.suppress(OSError):  # wakes the other pump; a reset comes without the polite end
                    sock.shutdown(socket.SHUT_RD if pair.is_reset else socket.SHUT_RDWR)
            if pair.leave():
                with self._lock:
                    self._sockets -= {pair.client, pair.server}
                pair.client.close()
                pair.server.close()

    def _pass(self, data: bytes, sink: socket.socket, to_server: bool, pair: _Pair) -> None:
        with self._lock:
            fault = self._fault
            if fault is None or fault.to_server != to_server or fault.fired.is_set():
                fault = None
            elif fault.seen + len(data) <= fault.after:
                fault.seen += len(data)
                fault = None
            else:
                fault.fired.set()
        if fault is None:
            sink.sendall(data)
            return
        at = fault.after - fault.seen
        sink.sendall(data[:at])
        self._misbehave(fault, data[at:], sink, pair)

    def _misbehave(self, fault: Fault, rest: bytes, sink: socket.socket, pair: _Pair) -> None:
        if fault.kind == "flip":
            sink.sendall(bytes([rest[0] ^ (fault.size % 255 + 1)]) + rest[1:])
        elif fault.kind == "insert":
            sink.sendall(b"x" * fault.size + rest)
        elif fault.kind == "drop":
            sink.sendall(rest[fault.size :])
        elif fault.kind == "stall":
            fault.over.wait(60)
            raise OSError
        elif fault.kind == "drip":
            while rest and not fault.over.wait(fault.seconds):
                sink.sendall(rest[:1])
                rest = rest[1:]
            sink.sendall(rest)
        elif fault.kind == "reset":
            for sock in (pair.client, pair.server):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            pair.is_reset = True
            raise OSError
        else:
            assert fault.kind == "cut"
            raise OSError


class _Pair:
    """Both sides of a connection, closed when both pumps have left."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.is_reset = False
        self._left = 2
        self._lock = threading.Lock()

    def leave(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left == 0


@contextlib.contextmanager
def misbehaving(upstream: int) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Waits for what other threads or processes do."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
