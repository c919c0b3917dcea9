"""Real vLLM on a CPU, with and without kvortex: run by .ci/vllm in vLLM's own environment.

    python tests/integrations/vllm/live.py {none,connector,spec} SCENARIO MODEL BLOCK_SIZE ANSWERS

``none`` writes the scenario's tokens to the folder ANSWERS; the other two must give the same, and show that their blocks came
from kvortex, that a damaged one did not, and that nothing is left over. Prints a line a check; exits with 1 at the first that
fails. A scenario is a process: vLLM 0.32 on a CPU cannot start a second engine in one that has loaded Numba.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config import KVTransferConfig

PROMPT = [(i * 7) % 1000 + 3 for i in range(300)]
TINY_POOL = 12  # blocks; the prompts of the scenario have more


def plug(kind: str, blocks: int | None, block_bytes: int) -> dict[str, Any]:
    """vLLM's arguments for one of the plug-ins, with a pool of so many blocks (None: 64 MiB)."""
    if kind == "none":
        return {}
    extra: dict[str, Any] = {"cpu_pool_size_bytes": "64 MiB" if blocks is None else blocks * block_bytes}
    where = dict(kv_connector="KvortexConnector", kv_connector_module_path="kvortex.integrations.vllm")
    if kind == "spec":
        where = dict(kv_connector="OffloadingConnector")
        extra |= {"spec_name": "KvortexOffloadingSpec", "spec_module_path": "kvortex.integrations.vllm"}
    config = KVTransferConfig(
        **where, kv_role="kv_both", kv_load_failure_policy="recompute", kv_connector_extra_config=extra
    )
    return {"kv_transfer_config": config}


class Run:
    """One vLLM, and what kvortex says of it."""

    def __init__(self, kind: str, model: str, block_size: int, blocks: int | None = None, **more: Any) -> None:
        self.kind, self.block_size = kind, block_size
        given = dict(max_model_len=1024, max_num_seqs=4, dtype="bfloat16") | more
        self.llm = LLM(
            model=model, load_format="safetensors", skip_tokenizer_init=True, enforce_eager=True, seed=0, block_size=block_size,
            disable_log_stats=False, **plug(kind, blocks, 1024 * block_size), **given,
        )  # fmt: skip

    def ask(self, *prompts: list[int], tokens: int = 8) -> list[Any]:
        """Tokens of each answer."""
        params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True, logprobs=1)
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

    def settle(self) -> None:
        """Steps in which the last transfers begin, and are reported; their prompts fill no block."""
        for k in range(3):
            self.ask([(i * 13 + k * 17) % 1000 + 3 for i in range(self.block_size // 2)], tokens=2)

    def forget(self) -> None:
        """Empties vLLM's own prefix cache; after some steps, with prompts that fill no block, where 0.15's OffloadingConnector
        still holds blocks that were stored."""
        for k in range(10):
            if self.llm.reset_prefix_cache():
                return
            self.ask([(i * 11 + k * 13) % 1000 + 3 for i in range(self.block_size // 2)], tokens=2)
        raise SystemExit("FAILED: vLLM's prefix cache could not be reset: blocks are held for ever")

    @property
    def worker(self) -> Any:
        """kvortex's half in this process."""
        from kvortex.integrations.vllm import links

        (worker,) = links.workers()
        return worker

    def stats(self) -> Any:
        """Of kvortex's engine."""
        return self.worker.store.engine.get_stats()

    def came(self) -> int:
        """Blocks that came from kvortex so far, and were what was saved."""
        return int(self.stats().loaded_blocks - self.stats().corrupt_blocks)

    def ledger(self) -> Any:
        """What the scheduler's half knows."""
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        if self.kind == "connector":
            return connector._scheduler.ledger
        return connector.connector_scheduler.manager._manager.ledger

    def damage(self, block: int, *, wholly: bool = False) -> None:
        """Flips a bit in the stored bytes of one block, by the order of slots that were filled first; or all of them, by which
        tokens surely are others where the block is used."""
        store = self.worker.store
        keys = store._keys[[block]]
        slot = int(store.engine._index.acquire(keys)[0])
        store.engine._index.release([slot])
        record = store.engine._parts.arena.view(slot)
        record[slice(None) if wholly else slice(1000, 1001)] ^= 255 if wholly else 16

    def begin(self, name: str, prompt: list[int], hold: Hold) -> None:
        """Asks, and goes on until the prompt's blocks are being loaded, which nobody hears the end of."""
        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
        for _ in range(20):
            self.llm.llm_engine.step()
        check("a load is on its way", hold.begun > 0 and bool(self.worker.store._running), hold.begun)

    def left_over(self) -> list[str]:
        """What kvortex still remembers of requests and transfers."""
        holders = [(self.worker.store, "_running")]
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        if self.kind == "connector":
            holders += [(connector._scheduler, name) for name in ("_running", "_on_page", "_requests")]
            holders += [(self.worker, "_jobs"), (connector._scheduler.ledger, "_pending")]
        else:
            manager = connector.connector_scheduler.manager._manager
            holders += [(manager, "_pins"), (manager.ledger, "_pending")]
        return [f"{type(holder).__name__}.{name}" for holder, name in holders if getattr(holder, name)]

    def preemptions(self) -> int:
        """How often vLLM took a running request's pages away."""
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"))

    def close(self) -> None:
        """Nothing may be left over; then ends."""
        if self.kind != "none":
            self.settle()
            engine, counts, stats = self.worker.store.engine, self.ledger().counts(), self.stats()
            check("no pin and no reservation is left", counts.pinned == counts.reserved == stats.pinned_blocks == 0)
            check("no slot is left reserved", stats.reserved_blocks == 0 and stats.resident_blocks <= counts.resident)
            check("no request and no transfer is left", not self.left_over(), self.left_over())
            engine._index.check()
            pool = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
            check("no page of vLLM is left", pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)
            del engine
        self.shut_down()

    def shut_down(self) -> None:
        """Ends vLLM: kvortex's pool and threads end with it."""
        engine = weakref.ref(self.worker.store.engine) if self.kind != "none" else None
        begun = time.monotonic()
        self.llm.llm_engine.engine_core.shutdown()
        if engine is not None:
            del self.llm  # 0.15 tells no handlers that it ends: they go with it
            gc.collect()
            check("the pool is freed", (there := engine()) is None or there._closed)
            ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex")]
            check("no thread is left", not ours, ours)
            check("the end took its time", time.monotonic() - begun < 30, f"{time.monotonic() - begun:.1f} s")


class Hold:
    """Loads of a store whose ends nobody hears of until :meth:`release`. With ``spoil`` their pages are zeros then."""

    def __init__(self, store: Any, *, spoil: bool = False) -> None:
        self.begun, self.held, self._engine, self._load = 0, not spoil, store.engine, store.engine.load_blocks
        self._layout = store.engine.layout if spoil else None
        store.engine.load_blocks = self._hold

    def _hold(self, keys: Any, block_ids: Any, **more: Any) -> Any:
        self.begun += 1
        return Held(self, self._load(keys, block_ids, **more), block_ids)

    def ended(self, block_ids: Any) -> None:
        """A load has ended."""
        for base, stride, _, nbytes in self._layout.fragments.tolist() if self._layout is not None else ():
            for block in block_ids.tolist():
                ctypes.memset(base + stride * block, 0, nbytes)

    def let_go(self) -> None:
        """Later loads are the engine's own again; vLLM has frozen the collector, which would not find this cycle."""
        self._engine.__dict__.pop("load_blocks", None)

    def release(self) -> None:
        """All may hear."""
        self.held = False
        self.let_go()


class Held:
    """A ticket of one of them."""

    def __init__(self, hold: Hold, ticket: Any, block_ids: Any) -> None:
        self._hold, self._ticket, self._block_ids = hold, ticket, block_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)

    def done(self) -> bool:
        """As a ticket's."""
        if self._hold.held or not self._ticket.done():
            return False
        self._hold.ended(self._block_ids)
        return True


def check(what: str, good: bool, seen: Any = "") -> None:
    """A line, or the end."""
    print(f"{'ok' if good else 'FAILED'}: {what} {seen}", flush=True)
    if not good:
        raise SystemExit(1)


def one_prompt(kind: str, model: str, block_size: int) -> Any:
    """Cold, reloaded, with a damaged block, and after that."""
    run = Run(kind, model, block_size)
    full = len(PROMPT) // block_size * block_size
    answers = run.ask(PROMPT)
    if kind != "none":
        check("cold: nothing came from kvortex", run.cached == [0] and run.came() == 0)
        run.forget()
        check("reload: the same tokens", run.ask(PROMPT) == answers)
        check("reload: all full blocks came from kvortex", run.cached == [full], run.cached)
        check("reload: kvortex says so", run.came() == full // block_size, run.came())
        run.forget()
        run.damage(3)
        before = run.came()
        check("damaged: the same tokens", run.ask(PROMPT) == answers)
        moved = run.came() - before
        check("damaged: that block was not taken", 0 < moved < full // block_size, moved)
        if kind == "connector":
            check("damaged: the load found it", run.stats().corrupt_blocks == 1, run.stats().corrupt_blocks)
        run.forget()
        check("repaired: the same tokens", run.ask(PROMPT) == answers)
        check("repaired: all full blocks came again", run.came() - before - moved == full // block_size)
        run.llm.reset_prefix_cache(reset_connector=True) if kind == "connector" else run.llm.reset_prefix_cache()
        if kind == "connector":
            before = run.came()
            check("reset of the connector: the same tokens", run.ask(PROMPT) == answers)
            check("reset of the connector: nothing came", run.came() == before)
    run.close()
    return answers


def many(kind: str, model: str, block_size: int) -> Any:
    """So many requests at once that vLLM takes pages away from running ones.

    In float32: logits of bfloat16 are often equal, or next to it, and which token then is the greatest depends in vLLM on what
    else is in its batch (without any connector too).
    """
    run = Run(
        kind, model, block_size, max_model_len=512, max_num_seqs=16, num_gpu_blocks_override=64 * 32 // block_size,
        dtype="float32",
    )  # fmt: skip
    heads = [[(i * 7 + h * 31) % 1000 + 3 for i in range(200)] for h in range(6)]
    prompts = [heads[k % 6] + [(i * 19 + k * 37) % 1000 + 3 for i in range(60)] for k in range(48)]
    answers = run.ask(*prompts, tokens=40)
    check("many: pages were taken away", run.preemptions() > 0, run.preemptions())
    if kind != "none":
        check("many: blocks came from kvortex", run.came() > 0, run.came())
        again = run.ask(*prompts, tokens=8)
        different = [k for k in range(len(prompts)) if again[k] != answers[k][:8]]
        check("many, again: the same tokens", not different, different)
    run.close()
    return answers


def small_pool(kind: str, model: str, block_size: int) -> Any:
    """A pool that does not hold what is asked for, several times over."""
    run = Run(kind, model, block_size, blocks=TINY_POOL)
    prompts = [[(i * 7 + k * 101) % 1000 + 3 for i in range(6 * block_size + 5)] for k in range(5)]
    answers = [run.ask(p) for p in prompts]
    for order in (prompts, prompts[::-1], prompts[::2]) if kind != "none" else ():
        run.forget()
        again = [run.ask(p) for p in order]
        check("small pool: the same tokens", again == [answers[prompts.index(p)] for p in order])
    if kind != "none":
        counts = run.ledger().counts()
        check("small pool: it evicted", counts.evictions > 0 and counts.capacity == TINY_POOL, counts)
        check("small pool: blocks came from kvortex", run.came() > 0, run.came())
    run.close()
    return answers


def restart(kind: str, model: str, block_size: int) -> Any:
    """A process after the one of ``one_prompt``, with a pool of its own, and vLLM's tokens as before."""
    run = Run(kind, model, block_size)
    answers = run.ask(PROMPT)
    if kind != "none":
        check("restart: nothing came from the pool that is gone", run.came() == 0)
        run.forget()
        check("restart: the same tokens", run.ask(PROMPT) == answers)
        check("restart: blocks came from kvortex", run.came() == len(PROMPT) // block_size)
    run.close()
    return answers


def cache_off(kind: str, model: str, block_size: int) -> Any:
    """As ``one_prompt``, by a vLLM that keeps no prefixes itself."""
    run = Run(kind, model, block_size, enable_prefix_caching=False)
    full, answers = len(PROMPT) // block_size, run.ask(PROMPT)
    if kind != "none":
        check("without vLLM's cache: nothing came", run.came() == 0)
        run.settle()
        check("without vLLM's cache: the same tokens", run.ask(PROMPT) == answers)
        check("without vLLM's cache: blocks came from kvortex", run.came() == full, run.came())
        run.damage(2, wholly=True)
        check("without vLLM's cache, damaged: the same tokens", run.ask(PROMPT) == answers)
        moved = run.came() - full
        check("without vLLM's cache, damaged: that block was not taken", 0 < moved < full, moved)
    run.close()
    return answers


def abort(kind: str, model: str, block_size: int) -> Any:
    """A request that is aborted while its blocks are loaded; others get its pages as soon as vLLM gives them away."""
    run = Run(kind, model, block_size, max_model_len=512, num_gpu_blocks_override=24 * 32 // block_size)
    others = [[(i * 23 + k * 41) % 1000 + 3 for i in range(8 * block_size)] for k in range(4)]
    answers = run.ask(PROMPT)
    if kind != "none":
        run.forget()
        hold = Hold(run.worker.store)
        run.begin("aborted", PROMPT, hold)
        run.llm.llm_engine.abort_request(["aborted"])
        for _ in range(3):
            run.llm.llm_engine.step()
        meanwhile = run.ask(*others)
        check("aborted: its load runs still", bool(run.worker.store._running))
        hold.release()
        del hold
        run.forget()
        before = run.came()
        check("aborted: the same tokens", run.ask(PROMPT) == answers)
        check("aborted: blocks came from kvortex", run.came() > before)
        run.forget()
        check("aborted: others' tokens as before", run.ask(*others) == meanwhile)
        answers += meanwhile
    else:
        answers += run.ask(*others)
    run.close()
    return answers


def shutdown(kind: str, model: str, block_size: int) -> Any:
    """vLLM ends while blocks are loaded."""
    run = Run(kind, model, block_size)
    answers = run.ask(PROMPT)
    if kind != "none":
        run.forget()
        hold = Hold(run.worker.store)
        run.begin("unanswered", PROMPT, hold)
        hold.let_go()
        del hold
    run.shut_down()
    return answers


def planted(kind: str, model: str, block_size: int) -> Any:
    """That these checks see anything at all: where loads leave zeros in their pages, tokens must be others."""
    run = Run(kind, model, block_size)
    answers = run.ask(PROMPT)
    if kind != "none":
        run.forget()
        hold = Hold(run.worker.store, spoil=True)
        check("planted zeros: other tokens", run.ask(PROMPT) != answers)
        check("planted zeros: they were loaded", hold.begun > 0 and run.came() > 0)
        hold.release()
        del hold
    run.close()
    return answers


ALL = (one_prompt, cache_off, restart, small_pool, many, abort, shutdown, planted)
SCENARIOS = {scenario.__name__: scenario for scenario in ALL}


def main() -> None:
    kind, name, model, block_size, folder = sys.argv[1:]
    answers, known = SCENARIOS[name](kind, model, int(block_size)), Path(folder) / f"{name}.json"
    if kind == "none":
        known.write_text(json.dumps(answers))
    else:
        there = json.loads(known.read_text())
        different = [k for k in range(len(there)) if answers[k] != there[k]]
        check("the tokens of a run without kvortex", len(answers) == len(there) and not different, different)
    print(f"{kind} {name}: all is well", flush=True)


if __name__ == "__main__":
    main()
