"""Real vLLM on a CPU, with and without kvortex: run by .ci/vllm in vLLM's own environment.

    python tests/integrations/vllm/live.py {none,connector,spec} SCENARIO MODEL BLOCK_SIZE ANSWERS

``none`` writes the scenario's tokens to the folder ANSWERS; the other two must give the same, and show that their blocks came
from kvortex, that a damaged one did not, and that nothing is left over. Prints a line a check; exits with 1 at the first that
fails. A scenario is a process: vLLM 0.32 on a CPU cannot start a second engine in one that has loaded Numba.
"""

from __future__ import annotations

import json
import sys
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
        """Tokens of each answer, with their logprobs as the CPU gave them."""
        params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True, logprobs=1)
        outputs = self.llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], params, use_tqdm=False)
        self.cached = [output.num_cached_tokens for output in outputs]
        return [list(output.outputs[0].token_ids) for output in outputs]

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

    def ledger(self) -> Any:
        """What the scheduler's half knows."""
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        if self.kind == "connector":
            return connector._scheduler.ledger
        return connector.connector_scheduler.manager._manager.ledger

    def damage(self, block: int) -> None:
        """Flips a bit in the stored bytes of one block, by the order of slots that were filled first."""
        store = self.worker.store
        keys = store._keys[[block]]
        slot = int(store.engine._index.acquire(keys)[0])
        store.engine._index.release([slot])
        store.engine._parts.arena.view(slot)[1000] ^= 16

    def preemptions(self) -> int:
        """How often vLLM took a running request's pages away."""
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"))

    def close(self) -> None:
        """Nothing may be left over; then ends."""
        if self.kind != "none":
            for k in range(3):  # steps in which the last transfers are reported
                self.ask([(i * 13 + k * 17) % 1000 + 3 for i in range(self.block_size // 2)], tokens=2)
            engine, counts, stats = self.worker.store.engine, self.ledger().counts(), self.stats()
            check("no pin and no reservation is left", counts.pinned == counts.reserved == stats.pinned_blocks == 0)
            check("no slot is left reserved", stats.reserved_blocks == 0 and stats.resident_blocks <= counts.resident)
            engine._index.check()
            pool = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
            check("no page of vLLM is left", pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)
        self.llm.llm_engine.engine_core.shutdown()


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
        check("cold: nothing came from kvortex", run.cached == [0] and run.stats().loaded_blocks == 0)
        run.forget()
        check("reload: the same tokens", run.ask(PROMPT) == answers)
        check("reload: all full blocks came from kvortex", run.cached == [full], run.cached)
        check("reload: kvortex says so", run.stats().loaded_blocks == full // block_size, run.stats().loaded_blocks)
        run.forget()
        run.damage(3)
        before = run.stats().loaded_blocks
        check("damaged: the same tokens", run.ask(PROMPT) == answers)
        moved = run.stats().loaded_blocks - before
        check("damaged: that block was not taken", 0 < moved < full // block_size, moved)
        run.forget()
        check("repaired: the same tokens", run.ask(PROMPT) == answers)
        check("repaired: all full blocks came again", run.stats().loaded_blocks - before - moved == full // block_size)
        run.llm.reset_prefix_cache(reset_connector=True) if kind == "connector" else run.llm.reset_prefix_cache()
        if kind == "connector":
            before = run.stats().loaded_blocks
            check("reset of the connector: the same tokens", run.ask(PROMPT) == answers)
            check("reset of the connector: nothing came", run.stats().loaded_blocks == before)
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
        check("many: blocks came from kvortex", run.stats().loaded_blocks > 0, run.stats().loaded_blocks)
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
        check("small pool: blocks came from kvortex", run.stats().loaded_blocks > 0, run.stats().loaded_blocks)
    run.close()
    return answers


def restart(kind: str, model: str, block_size: int) -> Any:
    """A process after the one of ``one_prompt``, with a pool of its own, and vLLM's tokens as before."""
    run = Run(kind, model, block_size)
    answers = run.ask(PROMPT)
    if kind != "none":
        check("restart: nothing came from the pool that is gone", run.stats().loaded_blocks == 0)
        run.forget()
        check("restart: the same tokens", run.ask(PROMPT) == answers)
        check("restart: blocks came from kvortex", run.stats().loaded_blocks == len(PROMPT) // block_size)
    run.close()
    return answers


SCENARIOS = {scenario.__name__: scenario for scenario in (one_prompt, restart, small_pool, many)}


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
