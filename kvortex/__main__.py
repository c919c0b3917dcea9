"""``python -m kvortex``."""

from __future__ import annotations

from kvortex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
