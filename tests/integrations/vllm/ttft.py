"""Time to the first token of a prompt of 2,000 tokens, on a CPU: ``python ttft.py MODEL BLOCK_SIZE``, as live.py is run.

One vLLM with the connector. In turn a prompt that nobody has asked before, and one that kvortex has and vLLM's own cache
has not.
"""

from __future__ import annotations

import statistics
import sys
import time

from live import Run
from vllm import SamplingParams, TokensPrompt

TURNS, TOKENS = 12, 2000


def first_token(run: Run, prompt: list[int]) -> float:
    """Milliseconds from the question to the first token."""
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, ignore_eos=True)
    begun = time.perf_counter()
    (output,) = run.llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 1
    run.cached = [output.num_cached_tokens]
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    model, block_size = sys.argv[1], int(sys.argv[2])
    run = Run("connector", model, block_size, max_model_len=4096, max_num_batched_tokens=4096)
    times: dict[str, list[float]] = {"computed": [], "from kvortex": []}
    for turn in range(TURNS + 1):
        prompt = [(i * 7 + turn * 131) % 1000 + 3 for i in range(TOKENS)]
        for kind in times:
            run.worker.store.wait([*run.worker.store._running])  # one token is too short a time for what was just computed
            run.forget()
            took = first_token(run, prompt)
            wanted = 0 if kind == "computed" else TOKENS // block_size * block_size
            assert run.cached == [wanted], (kind, run.cached)
            if turn:  # the first of each compiles
                times[kind].append(took)
    for kind, all_ in times.items():
        mean, median, spread = statistics.mean(all_), statistics.median(all_), f"{min(all_):.1f} to {max(all_):.1f}"
        print(f"ttft {kind}: mean {mean:.1f} ms, median {median:.1f}, {spread}, of {len(all_)}")


if __name__ == "__main__":
    main()
