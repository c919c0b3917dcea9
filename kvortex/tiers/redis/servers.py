"""Which server has which key, and connections to it: made by redis-py, which knows URLs, TLS and logins."""

from __future__ import annotations

import binascii
import importlib
import socket
import time
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, told
from kvortex.tiers.base import Call
from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.resp import ServerError, answer, command
from kvortex.tiers.remote.pool import Pool
from kvortex.tiers.remote.wire import Broken, Late, Wire

SLOTS = 16384
Endpoint = tuple[str, int]  # a host and a port; a socket's path and 0


class Servers:
    """The server that the URL names, or the masters of the cluster that it belongs to."""

    def __init__(self, options: RedisOptions) -> None:
        self._options = options
        self._redis = import_redis()
        try:
            self._arguments: dict[str, Any] = dict(self._redis.connection.parse_url(options.url))
            self._class = self._arguments.pop("connection_class", self._redis.connection.Connection)
            self._connection(self._home, 1.0)
        except Exception as error:  # it may quote the URL
            raise ConfigError(f"url of a Redis tier cannot be used: {hidden_in(told(error), options.url)}") from None
        self.pool = Pool(self._connect, options.connections)
        # Who owns each slot, by number among the endpoints; None where one server has all. One attribute: threads may ask
        # at the same time, and the last answer holds.
        self._map: tuple[npt.NDArray[np.int32] | None, list[Endpoint]] = (None, [self._home])
        self._is_known = False

    @property
    def _home(self) -> Endpoint:
        if "path" in self._arguments:
            return str(self._arguments["path"]), 0
        return str(self._arguments.get("host", "localhost")), int(self._arguments.get("port", 6379))

    def owners(self, names: list[bytes], call: Call) -> list[Endpoint | None]:
        """The endpoint of each name, which is hashed as a whole; None where no server has it. Asks the server first where
        that is not known."""
        if not self._is_known:
            self.refresh(call)
        owners, endpoints = self._map
        if owners is None:
            return [endpoints[0]] * len(names)
        found = [int(owners[binascii.crc_hqx(name, 0) % SLOTS]) for name in names]
        return [endpoints[at] if at >= 0 else None for at in found]

    def doubt(self) -> None:
        """A server was not as expected: asks anew before the next call."""
        if self._map[0] is not None:
            self._is_known = False

    def refresh(self, call: Call) -> None:
        """Asks the URL's server, or another of its cluster, who serves what."""
        trouble: Broken | None = None
        for endpoint in dict.fromkeys([*self._map[1], self._home]):
            try:
                self._ask(endpoint, call)
                return
            except Broken as error:
                trouble = error
                if type(error) is not Broken:
                    break
        raise trouble or Broken("no server is known")

    def _ask(self, endpoint: Endpoint, call: Call) -> None:
        with self.pool.lend(endpoint, call) as (wire, _):
            try:
                wire.send([command(b"CLUSTER", b"SLOTS")], call)
                ranges = answer(wire, call)
            except ServerError as error:
                if error.code in ("LOADING", "MASTERDOWN", "NOAUTH"):
                    raise Broken(f"the server says: {error}") from None
                self._map = None, [self._home]  # no cluster, or no right to ask
            else:
                self._map = _masters(ranges, endpoint)
        self.pool.keep_only([*self._map[1], self._home])
        self._is_known = True

    def largest_value(self, endpoint: Endpoint, call: Call) -> int:
        """Bytes of the largest value that a server takes: its ``proto-max-bulk-len``, or what that is by default."""
        try:
            with self.pool.lend(endpoint, call) as (wire, _):
                wire.send([command(b"CONFIG", b"GET", b"proto-max-bulk-len")], call)
                found = answer(wire, call)
            if isinstance(found, list) and len(found) == 2 and isinstance(found[1], bytes):
                return int(found[1])
        except (ServerError, ValueError):  # managed services refuse CONFIG
            pass
        return 512 << 20

    def close(self) -> None:
        self.pool.close()

    def _connect(self, endpoint: Endpoint, call: Call) -> Wire:
        steps = self._steps(endpoint)
        left = call.left()
        timeout = min(self._options.connect_timeout_s, left)
        if not timeout:
            raise Late("the deadline passed")
        connection = self._connection(endpoint, timeout / steps)
        try:
            connection.connect()
            wire = Wire(connection._sock, connection.disconnect)
            self._log_in(connection, wire, call)
            return wire
        except self._redis.exceptions.TimeoutError:
            connection.disconnect()
            raise (Broken if timeout < left else Late)("the server does not answer: connecting took too long") from None
        except (self._redis.exceptions.RedisError, ValueError) as error:  # the latter of a host that can be none
            connection.disconnect()
            raise Broken(hidden_in(told(error), self._options.url)) from None
        except ServerError as error:
            connection.disconnect()
            raise Broken(f"the server refuses the login: {error.code}") from None
        except BaseException:
            connection.disconnect()
            raise

    def _steps(self, endpoint: Endpoint) -> int:
        """How often redis-py waits until it has connected: for each of the name's addresses, and for TLS."""
        if "path" in self._arguments:
            return 1
        try:
            addresses = len(socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM))
        except (OSError, ValueError):  # which redis-py will meet too
            addresses = 1
        return max(1, addresses) + issubclass(self._class, self._redis.connection.SSLConnection)

    def _connection(self, endpoint: Endpoint, timeout: float) -> Any:
        """redis-py's, which connects and does TLS, and has ``timeout`` for each step of that; what it would say then is said by
        :meth:`_log_in`, with the deadline."""
        arguments = self._arguments | {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "retry": self._redis.retry.Retry(self._redis.backoff.NoBackoff(), 0),
            "redis_connect_func": lambda connection: None,
        }
        if "path" not in arguments:
            arguments |= {"host": endpoint[0], "port": endpoint[1]}
        return self._class(**arguments)

    def _log_in(self, connection: Any, wire: Wire, call: Call) -> None:
        provider = connection.credential_provider
        if provider is None and (connection.username or connection.password):
            provider = self._redis.credentials.UsernamePasswordCredentialProvider(connection.username, connection.password)
        terms = Call(min(call.deadline, time.monotonic() + self._options.connect_timeout_s), call.cancelled)
        if provider is not None:
            words = [word if isinstance(word, bytes) else str(word).encode() for word in provider.get_credentials()]
            wire.send([command(b"AUTH", *words)], terms)
            answer(wire, terms)
        if connection.db:
            wire.send([command(b"SELECT", b"%d" % int(connection.db))], terms)
            answer(wire, terms)
        wire.served = 0


def parse_address(address: str, asked: Endpoint) -> Endpoint:
    """``host:port`` of a redirection; no host means that of the server that was asked."""
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit():
        raise Broken("the server redirects to an address that is none")
    return host.strip("[]") or asked[0], _port(int(port))


def _port(number: int) -> int:
    if not 0 < number < 1 << 16:  # the system would take 65537 for 1
        raise Broken("the server names a port that is none")
    return number


def _masters(ranges: object, asked: Endpoint) -> tuple[npt.NDArray[np.int32], list[Endpoint]]:
    """The answer to ``CLUSTER SLOTS`` as an endpoint's number for each slot, and the endpoints."""
    owners = np.full(SLOTS, -1, np.int32)
    numbers: dict[Endpoint, int] = {}
    try:
        for first, last, master, *_ in ranges:  # type: ignore[attr-defined]
            host = (master[0] or b"").decode()
            endpoint = (asked[0] if host in ("", "?") else host, _port(int(master[1])))
            owners[int(first) : int(last) + 1] = numbers.setdefault(endpoint, len(numbers))
    except (TypeError, ValueError, IndexError, AttributeError):
        raise Broken("the server's answer is none to CLUSTER SLOTS") from None
    if not numbers:
        raise Broken("the cluster has no slots yet")
    return owners, list(numbers)


def import_redis() -> Any:
    """redis-py. ConfigError where it is not installed."""
    try:
        for part in ("backoff", "connection", "credentials", "exceptions", "retry"):
            importlib.import_module(f"redis.{part}")
        return importlib.import_module("redis")
    except ImportError:
        cure = 'pip install -e ".[redis]" in the kvortex checkout'
        raise ConfigError(f"a Redis tier needs redis-py, of the extra redis: {cure}") from None


def hidden_in(text: str, url: str) -> str:
    """A message without the URL's secrets, as they are written there and as they are meant."""
    login = url.partition("://")[2].rpartition("@")[0]
    for secret in sorted(filter(None, {url, login, login.partition(":")[2]}), key=len, reverse=True):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text
