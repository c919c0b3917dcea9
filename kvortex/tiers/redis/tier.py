"""The Redis tier: batches over connections, and what becomes of each key."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvortex.errors import cut
from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Fetched, Int64s, Outcome, Outcomes, Tier, answer
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.redis.exchange import Exchange, Existing, Getting, Putting, Removing
from kvortex.tiers.redis.layout import names
from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.servers import Endpoint, Servers, parse_address
from kvortex.tiers.remote.arrivals import PENDING, Arrivals, load_compiled
from kvortex.tiers.remote.crew import Crew
from kvortex.tiers.remote.probing import probe_record
from kvortex.tiers.remote.wire import Broken

_LEAST_SHARE = 4 << 20  # bytes of a batch for which another thread is worth its while
_LEAST_COUNT = 128  # and commands


class RedisTier(Tier):
    """Records in a Redis or Valkey server, or in a cluster of them.

    Parameters
    ----------
    options
    record_format
        What the engine's records have in common.

    Notes
    -----
    Connects at the first call, and again whenever a connection was lost. Nothing of a pipeline is read by guess: a
    connection that owes an answer is closed. A forked process makes its own connections.

    Raises
    ------
    ConfigError
        redis-py is not installed, or the URL is none of its.
    """

    name = "redis"

    def __init__(self, options: RedisOptions, record_format: RecordFormat) -> None:
        self.options, self.format = options, record_format
        self._servers = Servers(options)
        self._crew = Crew(self.name, options.connections)
        self._largest: dict[Endpoint, int] = {}
        self._closed = False
        self.trouble = ""  # what was wrong last, in words; for whoever asks
        load_compiled()

    def contains(self, keys: KeyArray, call: Call) -> npt.NDArray[np.bool_] | None:
        found = Existing(self._names(keys))
        self._run(found, call)
        return answer(found.outcomes)

    def get_into(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        found = self._fetch(keys, addresses, room, call)
        corrupt = np.flatnonzero(found.outcomes == Outcome.CORRUPT)
        if len(corrupt):  # or read between another engine's two strings, if that has other bits of the same block
            again = self._fetch(keys[corrupt], addresses[corrupt], room[corrupt], call)
            found.outcomes[corrupt], found.sizes[corrupt], found.digests[corrupt] = again.outcomes, again.sizes, again.digests
            self.delete(keys[corrupt[again.outcomes == Outcome.CORRUPT]], call)
        return found

    def _fetch(self, keys: KeyArray, addresses: Int64s, room: Int64s, call: Call) -> Fetched:
        arrivals = Arrivals(self.format, keys, addresses, room)
        self._run(Getting(self._names(keys), arrivals, self.options), call)
        return arrivals.fetched()

    def put_from(self, keys: KeyArray, addresses: Int64s, sizes: Int64s, digests: Digests, call: Call) -> Outcomes:
        putting = Putting(self._names(keys), self.format, keys, (addresses, sizes, digests), self.options)
        self._run(putting, call)
        return putting.outcomes

    def delete(self, keys: KeyArray, call: Call) -> Outcomes:
        removing = Removing(self._names(keys))
        self._run(removing, call)
        return removing.outcomes

    def probe(self, call: Call) -> str | None:
        self.trouble = ""
        return probe_record(self, self.format, call, lambda: self.trouble)

    def close(self) -> None:
        self._closed = True
        self._crew.close()
        self._servers.close()

    def _names(self, keys: KeyArray) -> list[bytes]:
        return names(self.format.namespace, [key.tobytes() for key in keys])

    def _run(self, exchange: Exchange, call: Call) -> None:
        """All of a batch, redirections once, and an outcome for each key."""
        everything = list(range(len(exchange.names)))
        try:
            if self._closed:
                raise Broken("the tier is closed")
            if not everything:
                return
            self._crew.run(self._jobs(exchange, everything, call), call)
            if exchange.redirected:
                self._follow(exchange, call)
        except Broken as error:
            self._note(error)
            exchange.settle(error.outcome)
        exchange.settle(Outcome.FAILED)
        if exchange.trouble:
            self._servers.doubt()
            self.trouble = cut(exchange.trouble, 200)

    def _follow(self, exchange: Exchange, call: Call) -> None:
        """Those that another server has, or is about to have: once."""
        redirected, exchange.redirected = exchange.redirected, {}
        asking: dict[Endpoint, list[int]] = defaultdict(list)
        again = []
        for at, (is_ask, address, asked) in redirected.items():
            exchange.outcomes[at] = PENDING
            if is_ask:
                asking[parse_address(address, asked)].append(at)
            else:
                again.append(at)
        exchange.asking = True
        self._crew.run([self._job(exchange, endpoint, some) for endpoint, some in asking.items()], call)
        exchange.asking = False
        if again:
            self._servers.refresh(call)
            self._crew.run(self._jobs(exchange, again, call), call)

    def _jobs(self, exchange: Exchange, some: list[int], call: Call) -> list[Callable[[Call], None]]:
        """A batch in parts: each of one server, and large enough for a thread."""
        by_server: dict[Endpoint | None, list[int]] = defaultdict(list)
        for at, owner in zip(some, self._servers.owners([exchange.names[at] for at in some], call), strict=True):
            by_server[owner].append(at)
        if by_server.pop(None, None):
            exchange.trouble = "the cluster has slots that no server serves"
        jobs = []
        for endpoint, mine in by_server.items():
            assert endpoint is not None
            nbytes = sum(exchange.cost(at) for at in mine)
            parts = min(self.options.connections, max(-(-nbytes // _LEAST_SHARE), -(-len(mine) // _LEAST_COUNT)))
            for part in range(parts):
                first, last = len(mine) * part // parts, len(mine) * (part + 1) // parts
                jobs.append(self._job(exchange, endpoint, mine[first:last], parts))
        return jobs

    def _job(self, exchange: Exchange, endpoint: Endpoint, some: list[int], parts: int = 1) -> Callable[[Call], None]:
        def job(call: Call) -> None:
            try:
                mine = some
                if isinstance(exchange, Putting):
                    mine = exchange.refuse_larger(some, self._largest_value(endpoint, call))
                if mine:
                    self._talk(exchange, endpoint, mine, call, parts)
            except Broken as error:
                self._servers.doubt()
                self._note(error)
                exchange.settle(error.outcome, some)

        return job

    def _talk(self, exchange: Exchange, endpoint: Endpoint, some: list[int], call: Call, parts: int) -> None:
        """One part on one connection; anew where one that had waited turned out dead before it said anything."""
        for fresh in (False, True):
            with self._servers.pool.lend(endpoint, call, fresh) as (wire, was_used):
                before = wire.served
                try:
                    exchange.talk(wire, some, endpoint, call, parts)
                    return
                except Broken as error:
                    if type(error) is not Broken or fresh or not was_used or wire.served != before:
                        raise

    def _largest_value(self, endpoint: Endpoint, call: Call) -> int:
        if endpoint not in self._largest:
            self._largest[endpoint] = self._servers.largest_value(endpoint, call)
        return self._largest[endpoint]

    def _note(self, error: Broken) -> None:
        self.trouble = cut(str(error), 200)
