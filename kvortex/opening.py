"""What an engine is made from, checked and put together before anything is taken."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kvortex.codecs import Codec, Tables, make_codec
from kvortex.config import KVortexConfig
from kvortex.devices import Device, open_device
from kvortex.errors import CodecError, ConfigError, LayoutError, shown
from kvortex.keys import Namespace
from kvortex.layout import KVLayout
from kvortex.tiers.codec_metrics import CodecTally
from kvortex.tiers.codings import TierCoding
from kvortex.tiers.record import RecordFormat
from kvortex.tiers.urls import options_of

# Names of dtypes that are not bfloat16, which libraries prefix with theirs.
_OTHER_DTYPE = re.compile(r"(^|[^b])(float16|fp16)|half|float(8|32|64)|fp(8|32)|e[45]m[23]|(^|[^u])int8", re.IGNORECASE)


_LOSSY_TIERS = b"kvortex-lossy-tiers-1"
_COARSE = 2  # the level of cachegen that cost a model 4.7 % of perplexity


def namespace_of(
    config: KVortexConfig, layout: KVLayout | None, codec: Codec | None = None, codings: Sequence[TierCoding | None] = ()
) -> Namespace:
    """What blocks are of, besides their tokens: for keys, and for records in tiers.

    A tier's codec with loss is a part of it: what has come back from there may lie in RAM and in tiers above, which engines
    that have agreed to no loss, or to another, must not share.
    """
    losses = sorted({coding.own.digest for coding in codings if coding is not None and coding.own is not None and coding.lossy})
    made = b"" if codec is None else codec.digest
    return Namespace(
        model=config.model,
        dtype=config.dtype,
        layout=(layout.fingerprint if layout is not None else b"") + made + b"".join([_LOSSY_TIERS, *losses] if losses else []),
        block_size=config.block_size,
        rank=config.rank,
        world_size=config.world_size,
        lora=config.lora,
        salt=config.salt,
    )


def codec_for(config: KVortexConfig, layout: KVLayout | None, device: Device) -> Codec | None:
    """The codec that the config names, for blocks of the layout; None for ``raw``.

    Raises
    ------
    ConfigError
        It cannot be; the message says why.
    """
    if config.codec == "raw":
        return None
    what = f"codec = {shown(config.codec)}"
    on_gpu = device.name != "host"
    if on_gpu and config.transfer_route not in ("auto", "staged"):
        seen = shown(config.transfer_route)
        how = "use 'auto' or 'staged', or codec = 'raw'"
        raise ConfigError(f"{what}: codes what is staged, and transfer_route = {seen}; {how}")
    layout, codec = _made(what, config.codec, config, layout)
    if on_gpu:
        from kvortex.transfer.coded.coders import check_codable

        try:
            check_codable(codec, layout.fragments)
        except CodecError as error:
            raise ConfigError(f"{what}: not on a GPU: {error}; use device = 'host', or codec = 'raw'") from error
    return codec


def codings_for(config: KVortexConfig, layout: KVLayout | None, codec: Codec | None) -> list[TierCoding | None]:
    """What each tier keeps of slots that hold records of ``codec``; None for these as they are.

    Raises
    ------
    ConfigError
        A tier's codec cannot be; the message says which and why.
    """
    found: list[TierCoding | None] = []
    for at, entry in enumerate(config.tiers):
        options = options_of(entry)
        what = f"tiers[{at}]: codec = {shown(options.codec)}"
        own = None
        if options.codec not in (None, config.codec):
            if codec is not None and not codec.exact:
                raise ConfigError(f"{what}: the pool's codec, {codec.name}, has lost what this one would code; leave it out")
            more = {} if options.codec_level is None else {"level": options.codec_level}
            own = _made(what, str(options.codec), config, layout, **more)[1]
        name = own.name if own is not None else "" if codec is None else codec.name
        found.append(TierCoding(codec, own, CodecTally(name)) if name else None)
    return found


def warnings_of(codings: Sequence[TierCoding | None]) -> list[str]:
    """What a user must hear of codecs with loss that tiers have."""
    lossy = [(at, each.own) for at, each in enumerate(codings) if each is not None and each.own is not None and each.lossy]
    said = []
    for at, own in lossy:
        what = f"tiers[{at}]: codec = {own.name!r}"
        if getattr(own, "level", 0) >= _COARSE:
            said.append(f"{what}, codec_level = {_COARSE}: cost a small model 4.7 % of perplexity, and level 1 0.8 %")
        if own.shape.parts != "KV":
            said.append(f"{what}: what loss does to a latent was never measured; plane loses nothing")
    if len(lossy) > 1:
        places = " and ".join(f"tiers[{at}]" for at, _ in lossy)
        said.append(f"{places} have codecs with loss: a block that goes from one to the other has lost what both lose")
    return said


def _made(
    what: str, name: str, config: KVortexConfig, layout: KVLayout | None, **parameters: Any
) -> tuple[KVLayout, Codec]:
    """A codec for blocks of the layout, which is there."""
    if layout is None or config.max_block_bytes is not None:
        raise ConfigError(f"{what}: codes pages of a layout, and no opaque buffers: pass a layout, leave out max_block_bytes")
    if not config.codec_tables:
        how = "`kvortex calibrate --tables` makes that file of a sample of the model's KV"
        raise ConfigError(f"{what}: needs codec_tables; {how}")
    for dtype in (config.dtype, *(str(getattr(owner, "dtype", "")) for owner in layout.owners)):
        if _OTHER_DTYPE.search(dtype):
            raise ConfigError(f"{what}: codes bfloat16, and the blocks are of {shown(dtype)}; use codec = 'raw'")
    try:
        tables, shape = Tables.load(config.codec_tables)
        codec = make_codec(name, shape, tables, **parameters)
    except CodecError as error:
        raise ConfigError(f"{what}: {error}") from error
    if shape.tokens != config.block_size:
        raise ConfigError(f"{what}: codec_tables are for blocks of {shape.tokens} tokens, and block_size = {config.block_size}")
    reason = None if codec.exact else shape.refusal(layout.layers)
    if layout.record_bytes != shape.raw_bytes:
        reason = f"a block has {layout.record_bytes} bytes, and the tables are for {shape.raw_bytes}"
    if reason is not None:
        raise ConfigError(f"{what}: codec_tables are not for this layout: {reason}")
    return layout, codec


def record_format(namespace: Namespace, record_bytes: int, codec: Codec | None) -> RecordFormat:
    """How tiers keep what slots hold."""
    if codec is None:
        return RecordFormat(namespace.seed, record_bytes)
    return RecordFormat(namespace.seed, record_bytes, codec.number, codec.shape.raw_bytes)


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
