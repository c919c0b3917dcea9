"""What an engine is made from, checked and put together before anything is taken."""

from __future__ import annotations

from kvortex.config import KVortexConfig
from kvortex.devices import Device, open_device
from kvortex.errors import ConfigError, LayoutError, shown
from kvortex.keys import Namespace
from kvortex.layout import KVLayout


def namespace_of(config: KVortexConfig, layout: KVLayout | None) -> Namespace:
    """What blocks are of, besides their tokens: for keys, and for records in tiers."""
    return Namespace(
        model=config.model,
        dtype=config.dtype,
        layout=layout.fingerprint if layout is not None else b"",
        block_size=config.block_size,
        rank=config.rank,
        world_size=config.world_size,
        lora=config.lora,
        salt=config.salt,
    )


def check_given(config: object, layout: object) -> None:
    """Refuses other things in the places of a config and a layout, by name: tensors, a class, the two exchanged."""
    if not isinstance(config, KVortexConfig):
        how = "KVortexConfig(...), or None for KVortexConfig.from_env()"
        raise ConfigError(f"config must be a KVortexConfig; seen: {type(config).__name__} {shown(config)}. Pass {how}.")
    if layout is not None and not isinstance(layout, KVLayout):
        how = "KVLayout.from_arrays(tensors, block_axis), or None for opaque buffers only"
        raise LayoutError(f"layout must be a KVLayout; seen: {type(layout).__name__} {shown(layout)}. Pass {how}.")


def open_for(config: KVortexConfig, layout: KVLayout | None) -> Device:
    """The device that the config names, or where the layout is; and only if they agree."""
    if layout is None:
        return open_device(config.device)
    device = open_device(layout.device if config.device == "auto" else config.device)
    if device.name != layout.device:
        raise LayoutError(f"the layout's tensors are on {layout.device}, and the config says device = {shown(config.device)}")
    for base, stride, _, nbytes in layout.fragments.tolist():
        for address in (base, base + stride * (layout.num_blocks - 1) + nbytes - 1):
            owner = device.owner_of(address)
            if owner is not None and owner != device.name:
                raise LayoutError(f"address {address:#x} of the layout belongs to {owner}, not to {device.name}")
    return device
