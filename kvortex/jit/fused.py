"""A product and a sum of float32 with one rounding, in compiled code: an instruction where the CPU has it, else a call of the C
library, to the same bits."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def fused(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of float32."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fma(*values)

    return types.float32(types.float32, types.float32, types.float32), emit
