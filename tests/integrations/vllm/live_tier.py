"""Real vLLM 0.32 on a CPU with a disk of kvortex's below vLLM's own pool: run by .ci/vllm, behind ``live.py none``.

    python tests/integrations/vllm/live_tier.py SCENARIO MODEL BLOCK_SIZE ANSWERS FOLDER

Scenarios are processes of their own, in this order: ``cold`` fills FOLDER, ``restart`` and ``damaged`` find what is there,
``small_pool`` asks for more than vLLM's pool holds, ``hanging`` meets a disk that does not answer, ``wrong`` must not start.
Tokens must be those without kvortex.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from live import PROMPT, Run, check
from vllm.config import KVTransferConfig

MAGIC = b"KVXRECRD"


class TierRun(Run):
    """One vLLM with a tier."""

    def __init__(self, model: str, block_size: int, folder: str, *, blocks: int = 256, **options: Any) -> None:
        url = f"disk:{folder}?capacity=64MiB"
        tier = {"type": "KvortexTier", "module_path": "kvortex.integrations.vllm", "url": url, **options}
        extra = {
            "spec_name": "HostTieringSpec", "spec_module_path": "tests.integrations.vllm.host_tiering",
            "cpu_bytes_to_use": blocks * 1024 * block_size, "secondary_tiers": [tier],
        }  # fmt: skip
        config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both", kv_connector_extra_config=extra)
        super().__init__("none", model, block_size, kv_transfer_config=config)

    @property
    def manager(self) -> Any:
        """vLLM's, over its pool and the tier."""
        connector = self.llm.llm_engine.engine_core.engine_core.scheduler.connector
        return connector.connector_scheduler.manager

    @property
    def side(self) -> Any:
        """kvortex's half."""
        return self.manager.secondary_tiers[0].side

    def count(self, operation: str) -> int:
        """Chunks that the disk stored or gave, well."""
        return sum(each.outcomes.get("ok", 0) for each in self.side.stats().operations if each.operation == operation)

    def stored(self, least: int) -> None:
        """Goes on until so many chunks are on the disk."""
        for _ in range(50):
            self.settle()
            if self.count("put") >= least:
                return
        check("chunks came to the disk", False, self.side.stats())

    def end(self) -> None:
        """Nothing may be left over; then ends."""
        for _ in range(100):
            self.settle()
            if not self.manager._jobs:
                break
        primary, side = self.manager.primary_tier, self.side
        held = [chunk for chunk in primary._policy.chunks.values() if chunk.ref_cnt]
        check("no chunk of vLLM's pool is left pinned", bool(primary._policy.chunks) and not held, held)
        check("no job is left", not self.manager._jobs and not side._jobs and not side._waiting and not side._storing)
        check("no question is left", not len(side._questions), len(side._questions))
        pool = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        check("no page of vLLM is left", pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)
        self.llm.llm_engine.engine_core.shutdown()
        ours = [thread.name for thread in threading.enumerate() if thread.name.startswith("kvortex")]
        check("no thread is left", not ours, ours)


def cold(model: str, block_size: int, folder: str) -> Any:
    """Chunks go to the disk as they are computed."""
    run = TierRun(model, block_size, folder)
    answers = run.ask(PROMPT)
    run.stored(len(PROMPT) // block_size)
    check("cold: nothing came from the disk", run.count("get") == 0)
    run.end()
    return answers


def restart(model: str, block_size: int, folder: str) -> Any:
    """Another process finds them."""
    run = TierRun(model, block_size, folder)
    answers = run.ask(PROMPT)
    full, cached = len(PROMPT) // block_size, run.cached
    check("restart: all full blocks came from the disk", run.count("get") == full and cached == [full * block_size], cached)
    run.forget()
    check("restart: the same tokens again", run.ask(PROMPT) == answers)
    check("restart: now from vLLM's pool", run.count("get") == full)
    run.end()
    return answers


def damaged(model: str, block_size: int, folder: str) -> Any:
    """A bit of a stored record has flipped: its chunk is computed, as are those behind it."""
    run = TierRun(model, block_size, folder)
    check("damaged: one record", _flip(Path(folder), 4) == 1)
    answers, full = run.ask(PROMPT), len(PROMPT) // block_size
    corrupt, good = run.side.stats().corrupt, run.count("get")
    check("damaged: it was seen, and not handed out", corrupt == 1 and good == full - 1, (corrupt, good))
    check("damaged: what is in front of it was taken", 0 < run.cached[0] < full * block_size, run.cached)
    run.stored(1)  # it was computed, and stored again
    run.end()
    return answers


def _flip(folder: Path, which: int) -> int:
    """A bit in the payload of one record, by their order in the file."""
    found = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data, at = path.read_bytes(), -1
        while (at := data.find(MAGIC, at + 1)) >= 0:
            if at % 4096 == 0 and int.from_bytes(data[at + 16 : at + 24], "little"):  # a record's header, of some payload
                found += 1
                if found == which:
                    with path.open("r+b") as file:
                        file.seek(at + 4096 + 77)
                        byte = file.read(1)
                        file.seek(at + 4096 + 77)
                        file.write(bytes([byte[0] ^ 4]))
                    return 1
    return 0


def small_pool(model: str, block_size: int, folder: str) -> Any:
    """vLLM's pool holds less than is asked for; the disk holds all."""
    run = TierRun(model, block_size, folder + "-small", blocks=12)
    prompts = [[(i * 7 + k * 101) % 1000 + 3 for i in range(6 * block_size + 5)] for k in range(5)]
    answers = []
    for prompt in prompts:
        answers += run.ask(prompt)
        run.stored(6 * len(answers))
    for order in (prompts, prompts[::-1], prompts[::2]):
        run.forget()
        again = [run.ask(prompt)[0] for prompt in order]
        check("small pool: the same tokens", again == [answers[prompts.index(prompt)] for prompt in order])
    check("small pool: chunks came from the disk", run.count("get") > 0, run.count("get"))
    run.end()
    return [[each] for each in answers]


def hanging(model: str, block_size: int, folder: str) -> Any:
    """A disk that answers no more: vLLM computes, and goes on."""
    run = TierRun(model, block_size, folder, read_timeout_s=0.3, write_timeout_s=0.3)
    tier, gate = run.side._line.tier, threading.Event()
    contains = tier.contains
    tier.contains = lambda keys, call: (gate.wait(60), contains(keys, call))[1]
    begun = time.monotonic()
    answers = run.ask(PROMPT)
    took = time.monotonic() - begun
    check("hanging: nothing came", run.count("get") == 0 and run.cached == [0], run.cached)
    check("hanging: nobody waited", took < 30, f"{took:.1f} s")
    gate.set()
    run.end()
    return answers


def wrong(model: str, block_size: int, folder: str) -> Any:
    """An unknown option ends vLLM at its start, by name."""
    try:
        TierRun(model, block_size, folder, capasity="1GiB")
    except Exception as error:
        text = f"{error!r} {error.__cause__!r} {error.__context__!r}"
        check("wrong: its name is told", "capasity" in text, text[:300])
        return None
    raise SystemExit("FAILED: an unknown option was taken")


SCENARIOS = {scenario.__name__: scenario for scenario in (cold, restart, damaged, small_pool, hanging, wrong)}


def main() -> None:
    name, model, block_size, answers, folder = sys.argv[1:]
    seen = SCENARIOS[name](model, int(block_size), folder)
    if seen is not None:
        there = json.loads((Path(answers) / f"{'small_pool' if name == 'small_pool' else 'one_prompt'}.json").read_text())
        different = [k for k in range(len(there)) if seen[k] != there[k]]
        check("the tokens of a run without kvortex", len(seen) == len(there) and not different, different)
    print(f"tier {name}: all is well", flush=True)


if __name__ == "__main__":
    main()
