"""A bucket, and who may ask for what is in it: credentials as AWS's own tools find them, by obstore."""

from __future__ import annotations

import configparser
import importlib
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from kvortex.errors import ConfigError, shown, told
from kvortex.tiers.remote.wire import Broken
from kvortex.tiers.s3.options import S3Options

_VALID = timedelta(minutes=15)
# Where obstore finds credentials in the environment by itself.
_IN_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


class Bucket:
    """A bucket, as obstore reaches it: credentials found, and kept fresh.

    Attributes
    ----------
    obstore
        The module.
    store
        Its store of this bucket.
    """

    def __init__(self, options: S3Options, timeout_s: float) -> None:
        self.obstore, store = _import_obstore()
        timeout = timedelta(seconds=timeout_s)
        given = {key: value for key, value in _given(options).items() if value is not None}
        endpoint = given.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
        try:
            if options.virtual_hosted and given.get("endpoint"):  # obstore takes it for the bucket's own
                parts = urlsplit(given["endpoint"])
                given["endpoint"] = f"{parts.scheme}://{options.bucket}.{parts.netloc}"
            self.store = store(
                options.bucket,
                virtual_hosted_style_request=options.virtual_hosted,
                client_options={"allow_http": endpoint.startswith("http://"), "timeout": timeout, "connect_timeout": timeout},
                retry_config={"max_retries": 1, "retry_timeout": timeout},
                **given,
            )
        except Exception as error:
            raise ConfigError(f"the options of an S3 tier cannot be used: {plain(error)}") from None

    def urls(self, method: str, names: Sequence[str]) -> list[SplitResult]:
        """Where to send a request for each object, for the next minutes.

        The body is not part of what is signed (a pass over it would cost more than sending it): the record's own digest
        guards it, and TLS.
        """
        try:
            return [urlsplit(url) for url in self.obstore.sign(self.store, method, list(names), _VALID)]
        except Exception as error:  # no credentials, or none to be had just now
            raise Broken(f"no credentials for the store: {plain(error)}") from None


def plain(error: Exception) -> str:
    """The first line of what obstore says: below, it shows what it holds."""
    return told(type(error)(str(error).partition("\n")[0]))


def _given(options: S3Options) -> dict[str, str | None]:
    """What obstore is told, beside what it finds by itself."""
    profile = _profile(options)
    found: dict[str, str | None] = {
        "endpoint": options.endpoint,
        "region": options.region,
        "access_key_id": options.access_key_id,
        "secret_access_key": options.secret_access_key,
        "session_token": options.session_token,
    }
    if options.access_key_id is None and (options.profile or not any(map(os.environ.get, _IN_ENVIRONMENT))):
        found["access_key_id"] = profile.get("aws_access_key_id")
        found["secret_access_key"] = profile.get("aws_secret_access_key")
        found["session_token"] = profile.get("aws_session_token")
        if options.profile and found["access_key_id"] is None:
            raise ConfigError(f"profile {shown(options.profile)} has no aws_access_key_id, and kvortex reads only keys there")
    if found["endpoint"] is None and not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")):
        found["endpoint"] = profile.get("endpoint_url")
    if found["region"] is None and not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        found["region"] = profile.get("region")
    return found


def _profile(options: S3Options) -> dict[str, str]:
    """Keys and values of the profile, in both of AWS's files; empty where there is none and none was named."""
    name = options.profile or os.environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, usual, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        path = Path(os.environ.get(variable) or Path.home() / ".aws" / usual)
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            raise ConfigError(f"{path} cannot be read as a file of AWS profiles") from None
        if parser.has_section(section):
            found |= dict(parser[section])
    if options.profile and not found:
        raise ConfigError(f"there is no profile {shown(options.profile)} in ~/.aws")
    return found


def _import_obstore() -> tuple[Any, Any]:
    try:
        return importlib.import_module("obstore"), importlib.import_module("obstore.store").S3Store
    except ImportError:
        raise ConfigError("an S3 tier needs obstore, of the extra s3: pip install -e '.[s3]' in kvortex's checkout") from None
