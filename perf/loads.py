"""What a GPU may be busy with while blocks move: products, attention, and layers of a model. Needs torch, to measure only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvortex.errors import TransferError
from perf import foreign

LOADS = ("gemm", "sdpa", "prefill")
_NAP_S = 1e-4
_HIDDEN, _QKV, _KV, _FEED_FORWARD, _TOKENS = 4096, 6144, 1024, 14336, 8192  # of Llama-3-8B, and a prompt


def make(name: str) -> Callable[[], Any]:
    """One pass of a load, in bf16, on random data.

    ``gemm``: 8192 x 8192 x 8192. ``sdpa``: attention of 4 x 32 heads over 8192 tokens of 128.
    ``prefill``: a layer of Llama-3-8B over 8192 tokens.
    """
    torch = foreign.torch()
    options = {"device": "cuda", "dtype": torch.bfloat16}
    attention = torch.nn.functional.scaled_dot_product_attention
    if name == "gemm":
        a, b = (torch.randn(8192, 8192, **options) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)
    if name == "sdpa":
        q, k, v = (torch.randn(4, 32, 8192, 128, **options) for _ in range(3))
        return lambda: attention(q, k, v)
    x = torch.randn(_TOKENS, _HIDDEN, **options)
    qkv, out = torch.randn(_HIDDEN, _QKV, **options), torch.randn(_HIDDEN, _HIDDEN, **options)
    up, down = torch.randn(_HIDDEN, 2 * _FEED_FORWARD, **options), torch.randn(_FEED_FORWARD, _HIDDEN, **options)

    def heads(part: Any, repeat: int) -> Any:
        return part.view(1, _TOKENS, -1, 128).transpose(1, 2).repeat_interleave(repeat, 1)

    def layer() -> Any:
        q, k, v = (x @ qkv).split([_HIDDEN, _KV, _KV], dim=1)
        mixed = attention(heads(q, 1), heads(k, 4), heads(v, 4), is_causal=True).transpose(1, 2).reshape(_TOKENS, _HIDDEN)
        gate, value = ((x + mixed @ out) @ up).split(_FEED_FORWARD, dim=1)
        return (torch.nn.functional.silu(gate) * value) @ down

    return layer


class Loop:
    """Passes of a load without a pause or an end, on a stream of default priority, cut into spans by events.

    Clocks follow temperature and power from one moment to the next, so what a span costs more than others shows only between
    neighbours. And a GPU that comes to the end of its power behind a pause, if only of some milliseconds, swings about it:
    spans of 0.1 s took up to a tenth longer and shorter, up and down once a second, 3 percent still after four seconds (an
    H200). So the loop goes on from the first turn of who is measured beside it to the end of the last one, and begins with
    ``SETTLE_SPANS`` that nobody looks at. A driver takes a thousand launches before it makes who launches wait: so passes are
    put on the stream as others end, by each call of :meth:`running`, ``AHEAD_S`` before their turn.

    Spans have numbers. One ends where the next one begins, but for the one in which the loop was started again.

    Parameters
    ----------
    name
        As of :func:`make`.
    seconds
        Of a span, about.
    """

    SETTLE_SPANS = 50
    AHEAD_S = 0.1

    def __init__(self, name: str, seconds: float) -> None:
        self._torch = foreign.torch()
        self._run, self._stream = make(name), self._torch.cuda.Stream()
        self._edges: list[Any] = []  # of spans: the events with which they begin
        self._now = 0  # the span that runs
        self._put = 0
        self.passes = 4  # of a span
        self._behind = [self._event() for _ in range(self.passes)]  # passes that are on the stream
        self._begin()
        self.wait_for(1)
        one = self.seconds(1) / self.passes
        self._end()
        self._behind = [self._event() for _ in range(max(4, round(self.AHEAD_S / one)))]
        self.passes = max(4, round(seconds / one))

    def _event(self) -> Any:
        return self._torch.cuda.Event(enable_timing=True)

    def _begin(self) -> None:
        self._now = len(self._edges)
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            self._run()
            self._edge()
        self._go_on()

    def _end(self) -> None:
        """Waits for the passes that are on the stream."""
        while not self._behind[(self._put - 1) % len(self._behind)].query():
            time.sleep(_NAP_S)
        self._put = 0

    def _edge(self) -> None:
        self._edges.append(self._event())
        self._edges[-1].record()

    def start(self) -> None:
        """Begins, also once more; clocks have settled when this returns, and a span begins."""
        if self._put:
            self._end()
        self._begin()
        self.wait_for(self._now + self.SETTLE_SPANS - 1)

    def _go_on(self) -> None:
        """Puts passes on the stream, as many as are to be there."""
        count = len(self._behind)
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            while self._put < count or self._behind[self._put % count].query():
                if self._put >= count and self._behind[(self._put - 1) % count].query():
                    raise TransferError("a load had nothing left to do: what was measured with it takes too long")
                self._run()
                self._behind[self._put % count].record()
                self._put += 1
                if self._put % self.passes == 0:
                    self._edge()

    @property
    def span(self) -> int:
        """The number of the one that runs, as far as :meth:`running` was asked."""
        return self._now

    def running(self, span: int) -> bool:
        """Whether a span, or one before it, has not ended. To be asked every ``AHEAD_S`` at least."""
        self._go_on()
        while self._now + 1 < len(self._edges) and self._edges[self._now + 1].query():
            self._now += 1
        return self._now <= span

    def wait_for(self, span: int) -> None:
        """Until it has ended."""
        while self.running(span):
            time.sleep(_NAP_S)

    def seconds(self, span: int) -> float:
        """How long one took that has ended."""
        return float(self._edges[span].elapsed_time(self._edges[span + 1])) * 1e-3
