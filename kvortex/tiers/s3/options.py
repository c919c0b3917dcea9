"""What a user says about an S3 tier."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvortex.errors import ConfigError, shown
from kvortex.tiers.remote.checks import check_connect_timeout, check_count

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.\-_]{1,61}[a-z0-9]", re.IGNORECASE)
_PREFIX = re.compile(r"[A-Za-z0-9._=-]+(/[A-Za-z0-9._=-]+)*")
_MOST_CONNECTIONS = 1024


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Options of an :class:`S3Tier`.

    Parameters
    ----------
    bucket
        Its name. The bucket must be there.
    prefix
        Of all object names: letters, digits, ``. _ = -``, and ``/`` between parts.
    endpoint
        ``http://`` or ``https://``, a host and maybe a port; None for ``AWS_ENDPOINT_URL``, the profile's, or else AWS.
    region
        None for ``AWS_REGION``, the profile's, or else ``us-east-1``.
    access_key_id, secret_access_key, session_token
        Credentials. Without them, in this order: ``AWS_ACCESS_KEY_ID`` and so on, a web identity or a container's role from
        the environment, the profile in ``~/.aws``, and the instance's role. Never shown.
    profile
        In ``~/.aws/credentials`` and ``~/.aws/config``; None for ``AWS_PROFILE`` or ``default``. Only keys are read there.
    virtual_hosted
        The bucket's name is part of the host, as some stores want it, rather than of the path.
    ca_file
        Certificates to trust for ``https://``; None for the system's.
    connections
        Threads, and connections, that share a batch; 1 to 1024.
    retries
        How often a request is repeated that the store asks to repeat (status 429, 500, 502, 503, 504) or whose connection
        failed, within the call's deadline.
    connect_timeout_s
        Of a connection, TLS included, and of fetching credentials; a call's deadline bounds the former too.
    """

    bucket: str
    prefix: str = "kvortex"
    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    virtual_hosted: bool = False
    ca_file: str | None = None
    connections: int = 8
    retries: int = 2
    connect_timeout_s: float = 3.0

    def __post_init__(self) -> None:
        if not isinstance(self.bucket, str) or not _BUCKET.fullmatch(self.bucket):
            seen = "what looks like a login" if ":" in str(self.bucket) else shown(self.bucket)
            raise ConfigError(f"bucket must be an S3 bucket, 3 to 63 letters, digits, . and -, not {seen}")
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix) or {".", ".."} & set(self.prefix.split("/")):
            raise ConfigError(f"prefix must be words of letters, digits, . _ = - with / between them, not {shown(self.prefix)}")
        if self.endpoint is not None:
            self._check_endpoint()
        if (self.access_key_id is None) != (self.secret_access_key is None):
            raise ConfigError("access_key_id and secret_access_key go together; leave both out for the environment's")
        if self.session_token is not None and self.access_key_id is None:
            raise ConfigError("session_token needs access_key_id and secret_access_key")
        for name in ("region", "access_key_id", "secret_access_key", "session_token", "profile", "ca_file"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value or not value.isprintable()):
                raise ConfigError(f"{name} must be a text that is not empty")  # not shown: it may be a secret
        if not isinstance(self.virtual_hosted, bool):
            raise ConfigError(f"virtual_hosted must be true or false, not {shown(self.virtual_hosted)}")
        for name, least, most in (("connections", 1, _MOST_CONNECTIONS), ("retries", 0, 100)):
            check_count(name, getattr(self, name), least, most)
        check_connect_timeout(self.connect_timeout_s)

    def _check_endpoint(self) -> None:
        problem = "endpoint must be http:// or https:// with a host, and no login, path or query"
        try:
            parts = urlsplit(self.endpoint or "")
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
        except (ValueError, AttributeError, TypeError):
            raise ConfigError(problem) from None
        if not good or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(problem)
