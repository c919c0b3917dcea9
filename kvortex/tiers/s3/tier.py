"""The S3 tier: an object a record, a request a key, on several connections at once."""

from __future__ import annotations

import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult

import numpy as np
import numpy.typing as npt

from kvortex.errors import ConfigError, cut
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier, answer
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.remote.arrivals import PENDING, Arrivals, load_compiled
from kvortex.tiers.remote.crew import Crew
from kvortex.tiers.remote.pool import Pool
from kvortex.tiers.remote.probing import probe_record
from kvortex.tiers.remote.wire import PATIENCE, Broken, Late, Stopped, Wire, view_of
from kvortex.tiers.s3 import http
from kvortex.tiers.s3.bucket import Bucket
from kvortex.tiers.s3.options import S3Options

_MOST_BYTES = 5 << 30  # of an object in one request
_AGAIN = {429, 500, 502, 503, 504}
_SKIPPED = 1 << 16  # bytes that are cheaper read and forgotten than a new connection
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds before a request is repeated
_CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,80})</Code>")
_OUTCOMES = {"EntityTooLarge": Outcome.TOO_LARGE, "QuotaExceeded": Outcome.FULL, "XMinioStorageFull": Outcome.FULL}
# One request and the reading of its answer: a connection, host, target, index, terms -> outcome or PENDING, None for "again".
Ask = Callable[[Wire, str, str, int, Call], "int | None"]


class S3Tier(Tier):
    """Records as objects ``<prefix>/<namespace>/<aa>/<key>``: the header, and the payload behind it.

    Parameters
    ----------
    options
    record_format
        What the engine's records have in common.

    Notes
    -----
    obstore finds the credentials and signs; the bytes go straight between slots and sockets, each step with the call's
    deadline, which a library's own time-outs cannot give. Proxies are not used. Nothing is ever listed.

    Raises
    ------
    ConfigError
        obstore is not installed, or an option cannot be used.
    """

    name = "s3"

    def __init__(self, options: S3Options, record_format: RecordFormat) -> None:
        self.options, self.format = options, record_format
        self._bucket = Bucket(options, options.connect_timeout_s)
        self._context: ssl.SSLContext | None = None
        try:
            self._context = ssl.create_default_context(cafile=options.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"ca_file holds no certificates that can be used: {error}") from None
        self._pool: Pool[http.Endpoint] = Pool(self._connect, options.connections)
        self._crew = Crew(self.name, options.connections)
        self.trouble = ""  # what was wrong last, in words; for whoever asks
        load_compiled()

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        outcomes = np.full(len(keys), PENDING, np.uint8)
        self._run("HEAD", keys, outcomes, self._head, call)
        return answer(outcomes)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        arrivals = Arrivals(self.format, keys, addresses, room)

        def ask(wire: Wire, host: str, target: str, at: int, terms: Call) -> int | None:
            return self._get(arrivals, wire, host, target, at, terms)

        self._run("GET", keys, arrivals.outcomes, ask, call, arrivals.judge)
        corrupt = arrivals.outcomes == Outcome.CORRUPT
        if corrupt.any():
            self._run("DELETE", keys[corrupt], np.full(int(corrupt.sum()), PENDING, np.uint8), self._delete, call)
        return arrivals.fetched()

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        headers = memoryview(self.format.headers(keys, sizes, digests).tobytes())
        outcomes = np.where(np.asarray(sizes) + HEADER_BYTES > _MOST_BYTES, Outcome.TOO_LARGE, PENDING).astype(np.uint8)

        def ask(wire: Wire, host: str, target: str, at: int, terms: Call) -> int | None:
            header = headers[at * HEADER_BYTES : (at + 1) * HEADER_BYTES]
            body = [header, view_of(int(addresses[at]), int(sizes[at]))]
            return self._judge(wire, http.request(wire, "PUT", host, target, body, terms), "PUT", terms)

        self._run("PUT", keys, outcomes, ask, call)
        return outcomes

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        """S3 does not say whether there was an object, so it is asked first."""
        outcomes = np.full(len(keys), PENDING, np.uint8)
        self._run("HEAD", keys, outcomes, self._head, call)
        there = np.flatnonzero(outcomes == Outcome.OK)
        deleted = np.full(len(there), PENDING, np.uint8)
        self._run("DELETE", keys[there], deleted, self._delete, call)
        outcomes[there] = deleted
        return outcomes

    def probe(self, call: Call) -> str | None:
        self.trouble = ""
        return probe_record(self, self.format, call, lambda: self.trouble)

    def close(self) -> None:
        self._pool.close()
        self._crew.close()

    def _names(self, keys: KeyArray) -> list[str]:
        prefix = f"{self.options.prefix}/{self.format.namespace.hex()}"
        return [f"{prefix}/{name[:2]}/{name}" for name in (key.tobytes().hex() for key in keys)]

    def _run(
        self,
        method: str,
        keys: KeyArray,
        outcomes: Outcomes,
        ask: Ask,
        call: Call,
        conclude: Callable[[Sequence[int]], None] = lambda mine: None,
    ) -> None:
        """One request for each key that has no outcome yet; afterwards all have one. ``conclude`` is for what one thread
        has asked for and ``ask`` has left ``PENDING``."""
        todo = np.flatnonzero(outcomes == PENDING).tolist()
        try:
            if self._pool.is_closed():
                raise Broken("the tier is closed")
            if todo:
                urls = self._bucket.urls(method, self._names(keys[todo]))
                following = iter(list(zip(todo, urls, strict=True)))
                lock = threading.Lock()

                def job(terms: Call) -> None:
                    mine: list[int] = []
                    try:
                        while True:
                            with lock:
                                at, url = next(following, (None, None))
                            if at is None or url is None:
                                return
                            outcomes[at] = self._ask(ask, url, at, terms)
                            mine.append(at)
                    finally:
                        conclude(mine)

                self._crew.run([job] * min(self.options.connections, len(todo)), call)
        except Broken as error:
            self.trouble = cut(str(error), 200)
            outcomes[outcomes == PENDING] = error.outcome
        outcomes[outcomes == PENDING] = Outcome.FAILED

    def _ask(self, ask: Ask, url: SplitResult, at: int, call: Call) -> int:
        """One request, repeated as often as the options allow."""
        secure = url.scheme == "https"
        endpoint = http.Endpoint(url.scheme, url.hostname or "", url.port or (443 if secure else 80))
        target = f"{url.path}?{url.query}"
        pause, left, fresh = _FIRST_PAUSE, self.options.retries, False
        while True:
            try:
                if not call.left():
                    raise Late("the deadline passed")
                if call.cancelled():
                    raise Stopped("the call was cancelled")
                with self._pool.lend(endpoint, call, fresh) as (wire, was_used):
                    before = wire.served
                    try:
                        outcome = ask(wire, url.netloc, target, at, call)
                    except Broken as error:
                        if type(error) is Broken and was_used and not fresh and wire.served == before:
                            fresh = True  # it had been hung up on while it waited: that is no failure of the store
                            continue
                        raise
                if outcome is not None:
                    return outcome
            except Broken as error:
                self.trouble = cut(str(error), 200)
                if type(error) is not Broken or not left or self._pool.is_closed():
                    return error.outcome
            if not left:
                return Outcome.FAILED
            left -= 1
            _sleep(pause * (0.5 + random.random()), call)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _head(self, wire: Wire, host: str, target: str, at: int, call: Call) -> Outcome | None:
        return self._judge(wire, http.request(wire, "HEAD", host, target, [], call), "HEAD", call)

    def _delete(self, wire: Wire, host: str, target: str, at: int, call: Call) -> Outcome | None:
        return self._judge(wire, http.request(wire, "DELETE", host, target, [], call), "DELETE", call)

    def _get(self, arrivals: Arrivals, wire: Wire, host: str, target: str, at: int, call: Call) -> int | None:
        head = http.request(wire, "GET", host, target, [], call)
        if head.status != 200:
            return self._judge(wire, head, "GET", call)
        length = head.length
        if length is None:
            raise Broken("the store does not say how long an object is")
        wire.into(arrivals.header(at)[: min(length, HEADER_BYTES)], call)
        payload = length - HEADER_BYTES
        is_whole = payload >= 0 and payload == arrivals.payload_bytes(at)
        if is_whole:
            arrivals.take(wire, at, 0, payload, call)
        elif payload <= _SKIPPED:
            wire.skip(max(0, payload), call)
        if is_whole or payload <= _SKIPPED:
            http.finish(wire, head)
        arrivals.arrived(at, is_whole)
        return PENDING

    def _judge(self, wire: Wire, head: http.Head, method: str, call: Call) -> Outcome | None:
        """What an answer without an object makes of a key; None for a request that is to be repeated."""
        said = _CODE.search(http.text(wire, head, call))
        code = said.group(1).decode() if said else ""
        if head.status == 200 or (200 < head.status < 300 and method in ("PUT", "DELETE")):
            return Outcome.OK
        if head.status == 404 and method != "PUT" and code != "NoSuchBucket":
            return Outcome.MISS
        self.trouble = f"the store answers {method} with {head.status} {code}".rstrip()
        if head.status in (301, 307, 308):
            self.trouble += ": set the bucket's region or endpoint"
        if code in _OUTCOMES or head.status in (413, 507):
            return _OUTCOMES.get(code, Outcome.TOO_LARGE if head.status == 413 else Outcome.FULL)
        return None if head.status in _AGAIN else Outcome.FAILED

    def _connect(self, endpoint: http.Endpoint, call: Call) -> Wire:
        context = self._context if endpoint.scheme == "https" else None
        return http.connect(endpoint, self.options.connect_timeout_s, context, call)


def _sleep(seconds: float, call: Call) -> None:
    """As long as that, or until the call is over."""
    end = min(call.deadline, time.monotonic() + seconds)
    while not call.cancelled() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, PATIENCE))
