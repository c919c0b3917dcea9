"""What a GPU may be busy with while blocks move: products, attention, and layers of a model. Needs torch, to measure only."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvortex.errors import TransferError
from perf import foreign

LOADS = ("gemm", "sdpa", "prefill")
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
    """Passes of a load without a pause on a stream of default priority, cut into spans by events.

    Clocks follow temperature and power from one moment to the next, so what a span costs more than others shows only between
    neighbours; and a GPU that was idle runs faster than one that has come to the end of its power, so the first span is no
    one's neighbour. A driver takes a thousand launches before it makes who launches wait: so passes are put on the stream as
    others end, by each call of :meth:`running`, ``AHEAD_S`` before their turn.
    """

    WARM, BEFORE, BESIDE, DRAIN, AFTER = range(SPANS := 5)
    AHEAD_S = 0.1

    def __init__(self, name: str, seconds: float) -> None:
        self._torch = foreign.torch()
        self._run, self._stream = make(name), self._torch.cuda.Stream()
        self._edges = [self._event() for _ in range(self.SPANS + 1)]
        self.passes = 4  # of a span
        self._behind = [self._event() for _ in range(4 * self.SPANS)]  # passes that are on the stream
        self.start()
        one = self.seconds()[self.AFTER] / self.passes
        self._behind = [self._event() for _ in range(max(4, round(self.AHEAD_S / one)))]
        self.passes = max(4, round(seconds / one))

    def _event(self) -> Any:
        return self._torch.cuda.Event(enable_timing=True)

    def start(self) -> None:
        """Begins with the first span."""
        self._put = 0
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            self._run()
            self._edges[0].record()
        self._go_on()

    def _go_on(self) -> None:
        """Puts passes on the stream, as many as are to be there."""
        count = len(self._behind)
        with self._torch.no_grad(), self._torch.cuda.stream(self._stream):
            while self._put < self.SPANS * self.passes and (self._put < count or self._behind[self._put % count].query()):
                if self._put >= count and self._behind[(self._put - 1) % count].query():
                    raise TransferError("a load had nothing left to do: what was measured with it takes too long")
                self._run()
                self._behind[self._put % count].record()
                self._put += 1
                if self._put % self.passes == 0:
                    self._edges[self._put // self.passes].record()

    def running(self, span: int) -> bool:
        """Whether passes of a span, or of one before it, are left. To be asked every ``AHEAD_S`` at least."""
        self._go_on()
        return self._put < (span + 1) * self.passes or not self._edges[span + 1].query()

    def seconds(self) -> list[float]:
        """Waits for the end; the time of each span."""
        while self.running(self.SPANS - 1):
            time.sleep(1e-4)
        pairs = zip(self._edges[:-1], self._edges[1:], strict=True)
        return [float(first.elapsed_time(last)) * 1e-3 for first, last in pairs]
