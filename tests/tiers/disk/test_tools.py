"""What commands ask of folders: what is there, whether it is whole, and that it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvortex.errors import ConfigError
from kvortex.tiers.disk import listing, purge, verify
from tests.tiers.disk.rig import NAMESPACE, SLOT, Blocks, Patch, capacity, crash, opened


def test_a_listing_also_of_what_is_in_use(tmp_path: Path) -> None:
    blocks = Blocks(5, [8192, 8192, 100, 200, 1])
    with opened(tmp_path) as tier:
        blocks.put(tier)
        found = listing(str(tmp_path))
        assert found.in_use and not found.closed
        assert all(blocks.found(tier)), "looking changes nothing"
    found = listing(str(tmp_path))
    assert not found.in_use and found.closed and found.namespace == NAMESPACE.hex() and len(found.store) == 32
    assert (found.slots, found.slot_bytes, found.records, found.payload_bytes) == (8, SLOT, 5, 2 * 8192 + 301)
    with opened(tmp_path) as tier:
        assert all(blocks.found(tier))
        crash(tier)
    assert not listing(str(tmp_path)).closed


def test_verify_reads_every_record(tmp_path: Path) -> None:
    blocks, patch = Blocks(6, [8192, 5000] * 3), Patch(tmp_path)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        with pytest.raises(ConfigError, match="in use"):
            verify(str(tmp_path))
    seen: list[tuple[int, int]] = []
    found = verify(str(tmp_path), lambda done, of: seen.append((done, of)))
    assert (found.right, found.corrupt, found.unreadable, found.keys) == (6, 0, 0, ())
    assert seen == [(done, 6) for done in range(1, 7)]
    patch.flip(patch.slot(2) + 4096 + 4999, 3)
    found = verify(str(tmp_path))
    assert (found.right, found.corrupt) == (5, 1) and len(found.keys) == 1
    assert bytes.fromhex(found.keys[0]) in {key.tobytes() for key in blocks.keys}
    with open(tmp_path / "kvortex.slab", "r+b") as file:
        file.truncate(patch.slot(3) + 4096)
    found = verify(str(tmp_path))
    assert (found.right, found.corrupt, found.unreadable) == (2, 1, 5)


def test_purge_removes_it_unless_it_is_in_use(tmp_path: Path) -> None:
    blocks = Blocks(4)
    with opened(tmp_path) as tier:
        blocks.put(tier)
        with pytest.raises(ConfigError, match="in use"):
            purge(str(tmp_path))
        assert all(blocks.found(tier))
    assert purge(str(tmp_path)) == capacity(8)
    assert list(tmp_path.iterdir()) == []
    with opened(tmp_path) as tier:
        assert tier.recovered == 0


@pytest.mark.parametrize("tool", [listing, verify, purge])
def test_where_there_is_no_slab(tmp_path: Path, tool) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="name a folder that a disk tier has used"):
        tool(str(tmp_path))
    (tmp_path / "kvortex.slab").write_text("something else")
    with pytest.raises(ConfigError, match="no slab"):
        tool(str(tmp_path))
    assert (tmp_path / "kvortex.slab").read_text() == "something else"
