"""What is said to one server about the keys of a batch, pipelined, and how its answers are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kvortex.keys import KeyArray
from kvortex.tiers.base import Call, Digests, Int64s, Outcome
from kvortex.tiers.record import HEADER_BYTES, RecordFormat
from kvortex.tiers.redis.layout import body_bytes, body_name, head_name
from kvortex.tiers.redis.options import RedisOptions
from kvortex.tiers.redis.resp import ServerError, answer, bulk_length, command, end_bulk, long_set
from kvortex.tiers.redis.servers import Endpoint
from kvortex.tiers.remote.arrivals import PENDING, Arrivals
from kvortex.tiers.remote.wire import Broken, Wire, view_of

_IN_FLIGHT = 256  # keys at once at most, so that neither side's buffers fill with commands and answers
_TOGETHER = 1 << 18  # bytes of payloads from which on each is sent, or asked for, by itself
_SHORT = 4096  # bytes of a payload's end that are copied rather than sent from where they lie
_ASKING = command(b"ASKING")
_BOTH_OK = b"+OK\r\n+OK\r\n"
Command = list["bytes | memoryview"]


class Exchange:
    """One kind of request for n keys. Parts of it run on several threads, each with keys of its own."""

    answers = 1  # to one key

    def __init__(self, names: Sequence[bytes], in_flight_bytes: int = 1 << 40) -> None:
        self.names = names
        self.outcomes = np.full(len(names), PENDING, np.uint8)
        self.redirected: dict[int, tuple[bool, str, Endpoint]] = {}
        self.asking = False  # a slot migrates: each command is announced to where it goes
        self.trouble = ""  # what a server said that was wrong
        self._in_flight_bytes = in_flight_bytes

    def cost(self, at: int) -> int:
        """Payload of one key, in bytes."""
        return 0

    def request(self, at: int) -> list[Command]:
        """The commands that are sent for one key, each in parts."""
        raise NotImplementedError

    def receive(self, wire: Wire, at: int, call: Call) -> int:
        """Reads all answers to one key, whatever they are, and returns its outcome.

        Raises
        ------
        ServerError
            The first of them that was an error.
        """
        raise NotImplementedError

    def settle(self, outcome: Outcome, some: Iterable[int] | None = None) -> None:
        """Gives an outcome to those that have none."""
        if some is None:
            self.outcomes[self.outcomes == PENDING] = outcome
            return
        for at in some:
            if self.outcomes[at] == PENDING:
                self.outcomes[at] = outcome

    def talk(self, wire: Wire, some: Sequence[int], endpoint: Endpoint, call: Call, parts: int = 1) -> None:
        """Sends and receives for keys of one server, the answers in the order of the requests; as one of ``parts`` connections
        that do so, each of which may ask ahead as far as its part of what may be in flight."""
        most = self._in_flight_bytes // parts
        waiting: deque[int] = deque()
        unsent: list[Command] = []
        in_flight = unsent_bytes = 0
        try:
            for at, words in self._worded(some):
                cost = self.cost(at)
                if waiting and (in_flight + cost > most or len(waiting) >= _IN_FLIGHT):
                    unsent_bytes = self._send(wire, unsent, call)
                    fewest = _IN_FLIGHT // 2 if len(waiting) >= _IN_FLIGHT else _IN_FLIGHT
                    while waiting and (in_flight + cost > most or len(waiting) > fewest):
                        in_flight -= self._finish(wire, waiting, endpoint, call)
                if call.cancelled():
                    break
                unsent.append(words)
                waiting.append(at)
                in_flight, unsent_bytes = in_flight + cost, unsent_bytes + cost
                if unsent_bytes >= _TOGETHER or len(unsent) >= _IN_FLIGHT // 2:
                    unsent_bytes = self._send(wire, unsent, call)
            if call.cancelled():
                for _ in unsent:
                    waiting.pop()
            else:
                self._send(wire, unsent, call)
            while waiting:
                self._finish(wire, waiting, endpoint, call)
        finally:
            self.conclude(some)
        self.settle(Outcome.CANCELLED, some)

    def _worded(self, some: Sequence[int]) -> Iterator[tuple[int, Command]]:
        """Keys and all that is said about each; put into words for many at once, since between two large payloads nothing of
        that would be in the core's caches."""
        for start in range(0, len(some), _IN_FLIGHT):
            part = some[start : start + _IN_FLIGHT]
            yield from list(zip(part, map(self._words, part), strict=True))

    def _words(self, at: int) -> Command:
        found: Command = []
        for words in self.request(at):
            found += [_ASKING, *words] if self.asking else words
        return found

    def conclude(self, some: Sequence[int]) -> None:
        """Judges what has come, whatever came of the rest."""

    def _send(self, wire: Wire, unsent: list[Command], call: Call) -> int:
        """Sends what there is to say about some keys, and empties the list of that; the bytes that are left to send: none."""
        if unsent:
            parts = unsent[0] if len(unsent) == 1 else [part for words in unsent for part in words]
            wire.send(parts, call, self.answers * (1 + self.asking) * len(unsent))
            unsent.clear()
        return 0

    def _answer(self, wire: Wire, call: Call) -> object:
        self._permit(wire, call)
        return answer(wire, call)

    def _bulk_length(self, wire: Wire, call: Call) -> int:
        self._permit(wire, call)
        return bulk_length(wire, call)

    def _permit(self, wire: Wire, call: Call) -> None:
        """Reads the answer to the ``ASKING`` in front of a command."""
        if self.asking:
            try:
                answer(wire, call)
            except ServerError as error:
                raise Broken(f"the server says: {error}") from None

    def _finish(self, wire: Wire, waiting: deque[int], endpoint: Endpoint, call: Call) -> int:
        at = waiting.popleft()
        try:
            self.outcomes[at] = self.receive(wire, at, call)
        except ServerError as error:
            moved = error.moved
            if moved is not None and not self.asking:
                self.redirected[at] = (*moved, endpoint)
            elif error.outcome != Outcome.MISS:
                self.trouble = f"the server says: {error}"
            self.outcomes[at] = error.outcome
        return self.cost(at)

    def _answers(self, wire: Wire, call: Call) -> list[object]:
        """All answers to one key; errors among them only raise when the last is read."""
        found: list[object] = []
        trouble: ServerError | None = None
        for _ in range(self.answers):
            try:
                found.append(self._answer(wire, call))
            except ServerError as error:
                trouble = trouble or error
        if trouble is not None:
            raise trouble
        return found


class Existing(Exchange):
    """Are both strings of a record there?"""

    def request(self, at: int) -> list[Command]:
        return [[command(b"EXISTS", head_name(self.names[at]), body_name(self.names[at]))]]

    def receive(self, wire: Wire, at: int, call: Call) -> int:
        return Outcome.OK if _count(self._answer(wire, call)) == 2 else Outcome.MISS


class Removing(Exchange):
    """Forget both strings of a record."""

    def request(self, at: int) -> list[Command]:
        return [[command(b"UNLINK", head_name(self.names[at]), body_name(self.names[at]))]]

    def receive(self, wire: Wire, at: int, call: Call) -> int:
        return Outcome.OK if _count(self._answer(wire, call)) else Outcome.MISS


class Putting(Exchange):
    """Store records, the payload's larger part first: a record without a header is none."""

    answers = 2

    def __init__(
        self,
        names: Sequence[bytes],
        record_format: RecordFormat,
        keys: KeyArray,
        payloads: tuple[Int64s, Int64s, Digests],
        options: RedisOptions,
    ) -> None:
        super().__init__(names, options.in_flight_bytes)
        addresses, sizes, digests = payloads
        self._addresses, self._sizes = addresses.tolist(), sizes.tolist()
        self._headers = memoryview(record_format.headers(keys, sizes, digests).tobytes())
        self._options = [b"EX", b"%d" % options.ttl_s] if options.ttl_s is not None else []

    def cost(self, at: int) -> int:
        return int(self._sizes[at])

    def refuse_larger(self, some: Sequence[int], most: int) -> list[int]:
        """Those that a server with values of ``most`` bytes takes; the others are settled."""
        large = [at for at in some if max(body_bytes(self._sizes[at]), self._head_bytes(at)) > most]
        self.settle(Outcome.TOO_LARGE, large)
        return [at for at in some if self.outcomes[at] == PENDING]

    def _head_bytes(self, at: int) -> int:
        return int(HEADER_BYTES + self._sizes[at] - body_bytes(self._sizes[at]))

    def request(self, at: int) -> list[Command]:
        payload = view_of(self._addresses[at], self._sizes[at])
        header = self._headers[at * HEADER_BYTES : (at + 1) * HEADER_BYTES]
        body = body_bytes(len(payload))
        first = long_set(body_name(self.names[at]), [payload[:body]], self._options)
        second = long_set(head_name(self.names[at]), [header, payload[body:]], self._options)
        if self.asking or len(payload) - body > _SHORT:
            return [first, second]
        return [[*first[:-1], b"".join((first[-1], *second))]]  # fewer parts, which all cost the same

    def receive(self, wire: Wire, at: int, call: Call) -> int:
        if not self.asking and wire.begins_with(_BOTH_OK, call):  # mostly
            wire.answered(self.answers)
            return Outcome.OK
        if self._answers(wire, call) != ["OK", "OK"]:
            raise Broken("the server's answer is none to SET")
        return Outcome.OK


class Getting(Exchange):
    """Fetch records into slots, and check them while the next are on their way."""

    answers = 2

    def __init__(self, names: Sequence[bytes], arrivals: Arrivals, options: RedisOptions) -> None:
        super().__init__(names, options.in_flight_bytes)
        self.outcomes = arrivals.outcomes
        self._arrivals = arrivals
        self._room = arrivals.room.tolist()
        self._get = [b"GETEX"] if options.renew_ttl else [b"GET"]
        self._options = [b"EX", b"%d" % options.ttl_s] if options.renew_ttl and options.ttl_s is not None else []

    def cost(self, at: int) -> int:
        return int(self._room[at])

    def request(self, at: int) -> list[Command]:
        name = self.names[at]
        return [[command(*self._get, some, *self._options)] for some in (head_name(name), body_name(name))]

    def receive(self, wire: Wire, at: int, call: Call) -> int:
        trouble: ServerError | None = None
        tail = body = -1  # bytes of the payload in either string; -1: not there
        try:
            tail = self._head(wire, at, call)
        except ServerError as error:
            trouble = error
        try:
            body = self._body(wire, at, tail, call)
        except ServerError as error:
            trouble = trouble or error
        if trouble is not None:
            raise trouble
        if tail == -1 or (body == -1 and tail >= 0):
            return Outcome.MISS
        self._arrivals.arrived(at, tail >= 0 and body + tail == self._arrivals.payload_bytes(at))
        return PENDING

    def conclude(self, some: Sequence[int]) -> None:
        self._arrivals.judge(some)

    def _head(self, wire: Wire, at: int, call: Call) -> int:
        """Header and end of the payload; -1 where there is no such string, -2 where it is none of ours or does not fit."""
        length = self._bulk_length(wire, call)
        if length == -1:
            return -1
        wire.into(self._arrivals.header(at)[: min(length, HEADER_BYTES)], call)
        tail, whole = length - HEADER_BYTES, self._arrivals.payload_bytes(at)
        if 0 <= tail <= whole:
            self._arrivals.take(wire, at, whole - tail, tail, call)
        else:
            wire.skip(max(0, tail), call)
            tail = -2
        end_bulk(wire, call)
        return tail

    def _body(self, wire: Wire, at: int, tail: int, call: Call) -> int:
        """The beginning of the payload; -1 where there is no such string."""
        length = self._bulk_length(wire, call)
        if length == -1:
            return -1
        if tail >= 0 and length + tail == self._arrivals.payload_bytes(at):
            self._arrivals.take(wire, at, 0, length, call)
        else:
            wire.skip(length, call)
        end_bulk(wire, call)
        return length


def _count(found: object) -> int:
    if not isinstance(found, int):
        raise Broken("the server's answer is no number")
    return found
