"""What tiers on other machines share: connections with deadlines, a pool of them, threads, and records as they arrive."""

from __future__ import annotations
