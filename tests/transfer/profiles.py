"""Profiles for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvortex.devices.cuda import CudaDevice
from kvortex.transfer.profiles.profile import Profile, guess

H100 = guess(32e9 * 16 * 128 / 130 / 8, 132)  # PCIe 5 x16


def shape(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Engines that are created from now on work with what is guessed, but for ``changes``."""

    def profile_for(device: CudaDevice, *_: object) -> Profile:
        return replace(guess(device.link_rate, device.multiprocessors), **changes)

    monkeypatch.setattr("kvortex.transfer.profiles.calibrate.profile_for", profile_for)
