"""Real vLLM on a CPU with two ranks in two processes: ``python live_tp.py {none,connector,spec} MODEL BLOCK_SIZE ANSWERS``.

As live.py is run, with VLLM_ALLOW_INSECURE_SERIALIZATION=1, by which it looks into the ranks. Of the connector a block is
damaged on one rank alone: both must compute it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from live import PROMPT, Run, check


def _stats(worker: Any) -> tuple[int, int, int, int]:
    """Of a rank: blocks that came and were right, damaged ones, pins, and running transfers."""
    from kvortex.integrations.vllm import links

    (mine,) = links.workers()
    stats = mine.store.engine.get_stats()
    return stats.loaded_blocks - stats.corrupt_blocks, stats.corrupt_blocks, stats.pinned_blocks, len(mine.store._running)


def _damage(worker: Any, rank: int, block: int) -> None:
    from kvortex.integrations.vllm import links

    (mine,) = links.workers()
    engine = mine.store.engine
    if worker.rank == rank:
        slot = int(engine._index.acquire(mine.store._keys[[block]])[0])
        engine._index.release([slot])
        engine._parts.arena.view(slot)[1000] ^= 16


def ranks(run: Run, what: Any = _stats, *given: Any) -> list[Any]:
    """What each rank says."""
    return list(run.llm.collective_rpc(what, args=given))


def main() -> None:
    kind, model, block_size, folder = sys.argv[1:]
    run = Run(kind, model, int(block_size), tensor_parallel_size=2)
    full, known = len(PROMPT) // run.block_size, Path(folder) / "tp.json"
    answers = run.ask(PROMPT)
    if kind == "none":
        known.write_text(json.dumps(answers))
        print("none, two ranks: all is well", flush=True)
        return
    check("two ranks: the tokens of a run without kvortex", answers == json.loads(known.read_text()))
    check("two ranks: nothing came", [each[0] for each in ranks(run)] == [0, 0])
    run.forget()
    check("two ranks: the same tokens", run.ask(PROMPT) == answers)
    check("two ranks: all full blocks came to each", [each[0] for each in ranks(run)] == [full, full], ranks(run))
    check("two ranks: vLLM counts them", run.cached == [full * run.block_size], run.cached)
    if kind == "connector":
        run.forget()
        ranks(run, _damage, 1, 3)
        check("two ranks, one damaged: the same tokens", run.ask(PROMPT) == answers)
        check("two ranks, one damaged: the load found it", [each[1] for each in ranks(run)] == [0, 1], ranks(run))
        wanted = [each[0] + full for each in ranks(run)]
        run.forget()
        check("two ranks, repaired: the same tokens", run.ask(PROMPT) == answers)
        check("two ranks, repaired: all came to each", [each[0] for each in ranks(run)] == wanted, ranks(run))
    run.settle()
    counts = run.ledger().counts()
    check("two ranks: no pin, no reservation is left", counts.pinned == counts.reserved == 0)
    check("two ranks: no pin, no transfer is left", [each[2:] for each in ranks(run)] == [(0, 0)] * 2, ranks(run))
    run.llm.llm_engine.engine_core.shutdown()
    print(f"{kind}, two ranks: all is well", flush=True)


if __name__ == "__main__":
    main()
