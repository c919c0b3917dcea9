"""Made-up traces for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOONCAKE = Path(__file__).resolve().parents[1] / "../shared/data/mooncake_conversation_trace.jsonl"


def conversations(count: int, seed: int = 0) -> list[list[int]]:
    """Full blocks of requests that share prefixes, as turns of conversations do: an id always has the same predecessor."""
    rng = np.random.default_rng(seed)
    requests: list[list[int]] = []
    fresh = 1
    for _ in range(count):
        request = [0]
        if requests and rng.random() < 0.8:
            old = requests[-int(rng.integers(1, min(len(requests), 8) + 1))]
            request = old[: int(rng.integers(1, len(old) + 1))]
        grow = int(rng.integers(0, 8))
        requests.append(request + list(range(fresh, fresh + grow)))
        fresh += grow
    return requests


def write(path: Path, requests: Sequence[Sequence[int]]) -> str:
    """As a trace: each request ends with a block of one token, which is not full."""
    with path.open("w") as file:
        for at, ids in enumerate(requests):
            record = {"timestamp": at, "input_length": 512 * len(ids) + 1, "output_length": 1, "hash_ids": [*ids, 10**6 + at]}
            file.write(json.dumps(record) + "\n")
    return str(path)
