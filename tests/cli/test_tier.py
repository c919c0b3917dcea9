"""``kvortex tier`` and the doctor's look at tiers: what is there, whether it is whole, and that nothing is left behind."""

from __future__ import annotations

import json

import pytest

from kvortex.cli import doctor, main
from kvortex.devices import HostDevice
from kvortex.tiers.memory import shared_store
from tests.cli.screen import rows
from tests.pages import PagedCache, keys_of


def fill(name: str) -> None:
    cache = PagedCache.plain(HostDevice())
    cache.randomize()
    with cache.engine(tiers=(f"memory:{name}",)) as engine:
        engine.save_blocks(keys_of(1, 2, 3), [1, 2, 3]).wait()


def test_ls_verify_and_purge(capsys: pytest.CaptureFixture[str]) -> None:
    fill("cli-a")
    store = shared_store("cli-a")
    store.put(b"other", b"somebody else's")
    assert main(["tier", "ls", "memory:cli-a", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    (namespace,) = found.pop("namespaces")
    assert found.pop("codecs") == ["raw: 3 records"]
    assert found == {"records": 3, "payload_bytes": 3 * 16384, "others": 1} and namespace.endswith(": 3 records")
    assert main(["tier", "ls", "memory:cli-a"]) == 0
    assert rows(capsys.readouterr().out)["records"] == "3"
    store.remove(b"other")
    assert main(["tier", "verify", "memory:cli-a"]) == 0
    assert rows(capsys.readouterr().out)["right"] == "3"
    name = next(iter(store.objects))
    damaged = bytearray(store.objects[name])
    damaged[-1] ^= 1
    store.put(name, bytes(damaged))
    assert main(["tier", "verify", "memory:cli-a"]) == 1
    assert rows(capsys.readouterr().out)["corrupt"] == "1"
    assert main(["tier", "purge", "memory:cli-a"]) == 2
    assert "--yes" in capsys.readouterr().err and len(store.objects) == 3
    assert main(["tier", "purge", "memory:cli-a", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["removed_bytes"] > 3 * 16384 and not store.objects


@pytest.mark.parametrize(("url", "why"), [("ftp://me:secret@x", "unknown scheme"), ("memory:x?colour=1", "unknown option")])
def test_a_refusal_is_one_line_without_passwords(url: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tier", "ls", url]) == 2
    error = capsys.readouterr().err
    assert why in error and error.count("\n") == 1 and "secret" not in error


def test_what_a_kind_of_tier_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr("kvortex.tiers.memory.verify")
    assert main(["tier", "verify", "memory:x"]) == 2
    assert "not for tiers of this kind" in capsys.readouterr().err


def test_the_doctor_probes_what_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVORTEX_TIERS", raising=False)
    assert "tiers" not in doctor.examine()
    monkeypatch.setenv("KVORTEX_TIERS", "memory:cli-b,memory:cli-c?colour=red,ftp://me:secret@host")
    report = doctor.examine()
    assert report["tiers"]["memory:cli-b"].startswith("works: opened and probed in")
    assert "unknown option 'colour'" in report["tiers"]["memory:cli-c?colour=red"]
    assert "unknown scheme" in report["tiers"]["ftp://me:***@host"] and "secret" not in json.dumps(report)
    assert not shared_store("cli-b").objects
    missing = {item["what"] for item in report["missing"]}
    assert "a tier that works: ftp://me:***@host" in missing and "a tier that works: memory:cli-b" not in missing
    monkeypatch.setattr("kvortex.tiers.memory.MemoryTier.probe", lambda *_: "it is broken")
    assert doctor.examine()["tiers"]["memory:cli-b"] == "does not work: it is broken"
