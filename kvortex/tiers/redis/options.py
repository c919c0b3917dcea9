"""What a user says about a Redis tier."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from kvortex.errors import ConfigError, shown
from kvortex.tiers.remote.checks import check_connect_timeout, check_count

_SCHEMES = ("redis", "rediss", "unix")
_MOST_CONNECTIONS = 256
_MOST_SECONDS = 10 * 365 * 86400


@dataclass(frozen=True, kw_only=True)
class RedisOptions:
    """Options of a :class:`RedisTier`.

    Parameters
    ----------
    url
        As redis-py reads it: ``redis://[[user]:password@]host[:port][/db]``, ``rediss://`` for TLS (``?ssl_ca_certs=file``,
        ``?ssl_cert_reqs=none``), ``unix://[[user]:password@]/path.sock[?db=n]``. Whether a cluster answers there is asked of
        the server. Never shown: it may hold a password.
    ttl_s
        Seconds until the server forgets a record; None to leave that to its eviction.
    renew_ttl
        Whether a get starts those seconds anew (``GETEX``, Redis 6.2 and newer).
    connections
        Threads, and connections to each server, that share a batch; 1 to 256.
    in_flight_bytes
        Payload that a call asks of one server, or sends there, before it has read the answers: shared by the connections that
        share the batch, and one record each at least.
    connect_timeout_s
        Of a connection, login included; a call's deadline bounds it too.
    """

    url: str = field(default="redis://127.0.0.1:6379/0", repr=False)
    ttl_s: int | None = None
    renew_ttl: bool = False
    connections: int = 4
    in_flight_bytes: int = 8 << 20
    connect_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or self.url.partition("://")[0] not in _SCHEMES:
            raise ConfigError("url of a Redis tier must begin with redis://, rediss:// or unix://")
        parts = _parts(self.url)
        if parts.scheme != "unix" and "@" in parts.path + parts.fragment:  # it would be taken for a host, and shown
            raise ConfigError("url of a Redis tier: write / as %2F, # as %23 and @ as %40 in a user's name and password")
        number = parts.path.strip("/")
        if parts.scheme != "unix" and number and not (number.isascii() and number.isdecimal()):  # redis-py would take 0
            raise ConfigError(f"url of a Redis tier: the path is the number of a database, not {shown(number)}")
        if self.ttl_s is not None:
            check_count("ttl_s", self.ttl_s, 1, _MOST_SECONDS)
        if not isinstance(self.renew_ttl, bool):
            raise ConfigError(f"renew_ttl must be true or false, not {shown(self.renew_ttl)}")
        if self.renew_ttl and self.ttl_s is None:
            raise ConfigError("renew_ttl needs ttl_s: there is nothing to renew")
        check_count("connections", self.connections, 1, _MOST_CONNECTIONS)
        check_count("in_flight_bytes", self.in_flight_bytes, 1, 1 << 40)
        check_connect_timeout(self.connect_timeout_s)


def _parts(url: str) -> SplitResult:
    """Of a URL whose host and port can be read. No word of others is shown: it may be of a password that is not quoted."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        return parts
    except ValueError:
        cure = "a port is a number; in a login, write / ? # @ : and % as %2F %3F %23 %40 %3A and %25"
        raise ConfigError(f"url of a Redis tier has no host and port that can be read: {cure}") from None
