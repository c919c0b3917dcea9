"""Executes the PTX of a statement on a CPU, for a warp in lock step: what it does beside what its Python body says.

Straight-line texts with predicates, and no more instructions than statements of :mod:`kvortex.kernels` have. A
register is 32 words or, of addresses, 64-bit numbers, a lane each.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

LANES = np.arange(32)
Words = npt.NDArray[np.uint32]


def floats(words: Words) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(words, np.uint32).view(np.float32)


def words(numbers: Any) -> Words:
    return np.ascontiguousarray(numbers, np.float32).view(np.uint32)


def _fused_down(a: Words, b: Words, c: Words) -> Words:
    """Products and sums, rounded down once."""
    made = np.empty(32, np.float32)
    for lane, (x, y, z) in enumerate(zip(floats(a).tolist(), floats(b).tolist(), floats(c).tolist(), strict=True)):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = np.float32(float(exact))
        made[lane] = np.nextafter(near, np.float32(-np.inf)) if Fraction(float(near)) > exact else near
    return words(made)


def _fused(a: Words, b: Words, c: Words) -> Words:
    """Products and sums, rounded once: of two equally near the even one."""
    made = words(floats(a) * floats(b) + floats(c))
    for lane, (x, y, z) in enumerate(zip(floats(a).tolist(), floats(b).tolist(), floats(c).tolist(), strict=True)):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        middle = np.float32(float(exact))
        near = [middle, np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))]
        apart = [(abs(Fraction(float(each)) - exact), int(each.view(np.uint32)) & 1) for each in near]
        if exact:
            made[lane] = words(near[apart.index(min(apart))])[0]
    return made


def _half(up: bool) -> Callable[[Words], Words]:
    def convert(a: Words) -> Words:
        x = floats(a)
        half = x.astype(np.float16)
        wrong = half < x if up else half > x
        return (
            np.where(wrong, np.nextafter(half, np.float16(np.inf if up else -np.inf)), half).view(np.uint16).astype(np.uint32)
        )

    return convert


def _permute(a: Words, b: Words, which: Words) -> Words:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    picked = []
    for at in range(4):
        place = which >> np.uint32(4 * at)
        byte = both >> (np.uint64(8) * (place & np.uint32(7))) & np.uint64(255)
        repeated = (byte >> np.uint64(7)) * np.uint64(255)  # the sign, eight times
        picked.append(np.where(place & np.uint32(8), repeated, byte))
    return sum(byte << np.uint64(8 * at) for at, byte in enumerate(picked)).astype(np.uint32)  # type: ignore[union-attr]


def _table(a: Words, b: Words, c: Words, table: Words) -> Words:
    made = np.zeros(32, np.uint32)
    for at in range(8):
        if int(table[0]) >> at & 1:
            made |= (a if at & 4 else ~a) & (b if at & 2 else ~b) & (c if at & 1 else ~c)
    return made


def _brain(high: Words, low: Words) -> Words:
    def near(x: Words) -> npt.NDArray[np.uint64]:
        wide = x.astype(np.uint64)
        return (wide + np.uint64(0x7FFF) + (wide >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)

    return (near(low) | near(high) << np.uint64(16)).astype(np.uint32)


def _halves(of: Callable[..., Any]) -> Callable[..., Words]:
    """Of the halves of words, each by itself."""
    return lambda *given: of(*(np.ascontiguousarray(each).view(np.uint16) for each in given)).view(np.uint32)


def _shifted(left: bool) -> Callable[[Words, Words], Words]:
    return lambda a, b: a << b if left else a >> b


_FLOAT: dict[str, Callable[..., Any]] = {
    "add.rn.f32": np.add,
    "sub.rn.f32": np.subtract,
    "mul.rn.f32": np.multiply,
    "div.rn.f32": np.divide,
    "min.f32": np.fmin,
    "max.f32": np.fmax,
    "min.NaN.f32": np.minimum,
    "max.NaN.f32": np.maximum,
    "abs.f32": np.abs,
    "neg.f32": np.negative,
}
_WORD: dict[str, Callable[..., Any]] = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "mov.b64": lambda a: a,
    "shl.b32": _shifted(True),
    "shr.u32": _shifted(False),
    "shr.b32": _shifted(False),
    "and.b32": np.bitwise_and,
    "xor.b32": np.bitwise_xor,
    "add.u32": np.add,
    "sub.u32": np.subtract,
    "max.u32": np.maximum,
    "add.u64": np.add,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "add.u16x2": _halves(np.add),
    "min.u16x2": _halves(np.minimum),
    "max.u16x2": _halves(np.maximum),
    "vadd2.u32.u32.u32": lambda a, b, c: _halves(np.add)(a, b),
    "vmin2.u32.u32.u32": lambda a, b, c: _halves(np.minimum)(a, b),
    "vmax2.u32.u32.u32": lambda a, b, c: _halves(np.maximum)(a, b),
    "mul.wide.u32": lambda a, b: a.astype(np.uint64) * b,
    "mad.wide.u32": lambda a, b, c: a.astype(np.uint64) * b + c,
    "setp.gt.u32": np.greater,
    "setp.ge.u32": np.greater_equal,
    "setp.ne.and.u64": lambda a, b, p: (a != b) & p,
    "setp.eq.and.u64": lambda a, b, p: (a == b) & p,
    "setp.eq.u32": np.equal,
    "setp.ne.u32": np.not_equal,
    "selp.u32": lambda a, b, p: np.where(p, a, b),
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "selp.b64": lambda a, b, p: np.where(p, a, b),
    "prmt.b32": _permute,
    "lop3.b32": _table,
    "or.b32": np.bitwise_or,
    "fma.rm.f32": _fused_down,
    "fma.rn.f32": _fused,
    "cvt.rn.f32.u32": lambda a: words(a.astype(np.float32)),
    "cvt.rm.f16.f32": _half(False),
    "cvt.rp.f16.f32": _half(True),
    "cvt.u32.u16": lambda a: a & np.uint32(0xFFFF),
    "cvt.rn.bf16x2.f32": _brain,
    "shf.l.wrap.b32": lambda low, high, by: high << (by & np.uint32(31)) | low >> (-by & np.uint32(31)),
    "shfl.sync.bfly.b32": lambda a, flip, clamp, mask: a[LANES ^ int(flip[0])],
    "shfl.sync.up.b32": lambda a, by, clamp, mask: a[np.maximum(LANES - int(by[0]), 0)],
}


class Machine:
    """Registers of a warp, by name; ``$0``, ``$1``, ... too."""

    def __init__(self, registers: dict[str, Any]) -> None:
        self.registers = registers
        self._carry = np.zeros(32, np.uint64)

    def run(self, text: str) -> None:
        """Of a statement."""
        for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
            line = " ".join(line.split())
            if line and not line.startswith(".reg"):
                self._execute(line)

    def value(self, name: str) -> Any:
        if name[0] == "{":  # the lower word of 64 bits, and the upper one
            low, high = (self.registers[each].astype(np.uint64) for each in name[1:-1].split(","))
            return low | high << np.uint64(32)
        if re.fullmatch(r"0f[0-9A-F]{8}", name):
            return np.full(32, int(name[2:], 16), np.uint32)
        return np.full(32, int(name, 0), np.uint32) if name[0].isdigit() else self.registers[name]

    def _execute(self, line: str) -> None:
        live = np.ones(32, np.bool_)
        if line[0] == "@":
            guard, line = line[1:].split(" ", 1)
            live = self.registers[guard]
        name, rest = re.sub(r"\{(\w+), (\w+)\}", r"{\1,\2}", line).split(" ", 1)
        if name.startswith(("red.", "atom.")):
            self._atomic(name, rest, live)
            return
        if name.startswith(("ld.", "st.")):
            self._memory(name, rest, live)
            return
        target, *operands = rest.split(", ")
        if name.startswith("shfl") and "|" in target:  # and whether there is such a lane
            target, found = target.split("|")
            self.registers[found] = int(self.value(operands[1])[0]) <= LANES
        with np.errstate(all="ignore"):
            if name in ("mad.lo.cc.u32", "madc.hi.u32"):
                made = self._product(name, *(self.value(each).astype(np.uint64) for each in operands))
            elif name in _FLOAT:
                made = words(_FLOAT[name](*(floats(self.value(each)) for each in operands)))
            else:
                made = _WORD[name](*(self.value(each) for each in operands))
        if target[0] == "{":
            low, high = target[1:-1].split(",")
            self.registers[low], self.registers[high] = made.astype(np.uint32), (made >> np.uint64(32)).astype(np.uint32)
            return
        self.registers[target] = made if live.all() else np.where(live, made, self.registers[target])

    def _product(self, name: str, a: Any, b: Any, c: Any) -> Words:
        """One half of a product and a third number; the lower one's carry goes to the upper one."""
        total = (a * b & np.uint64(0xFFFFFFFF)) + c if name == "mad.lo.cc.u32" else (a * b >> np.uint64(32)) + c + self._carry
        self._carry = total >> np.uint64(32)
        return total.astype(np.uint32)

    def _atomic(self, name: str, rest: str, live: npt.NDArray[np.bool_]) -> None:
        """By one lane after another: an addition, or an increment that says what was there."""
        *target, at, operand = rest.split(", ")
        kind = ctypes.c_uint64 if name.endswith(".u64") else ctypes.c_uint32
        for lane in LANES[live]:
            cell = kind.from_address(int(self.registers[at[1:-1]][lane]))
            before, given = cell.value, int(self.value(operand)[lane])
            cell.value = before + given if ".add." in name else 0 if before >= given else before + 1
            for each in target:
                self.registers[each] = np.where(LANES == lane, np.uint32(before), self.registers[each])

    def _memory(self, name: str, rest: str, live: npt.NDArray[np.bool_]) -> None:
        found = re.search(r"\[(\S+?)(?:\+(\d+))?\]", rest)
        assert found is not None
        names = re.findall(r"[$\w]+", rest.replace(found[0], ""))
        kind = {".u64": ctypes.c_uint64, ".u16": ctypes.c_uint16}.get(name[-4:], ctypes.c_uint32)
        number = np.uint64 if name.endswith(".u64") else np.uint32  # what is shorter gets zeros above
        for lane in LANES[live]:
            cells = (kind * len(names)).from_address(int(self.registers[found[1]][lane]) + int(found[2] or 0))
            for at, each in enumerate(names):
                if name.startswith("st."):
                    cells[at] = int(self.registers[each][lane])
                else:
                    self.registers[each] = np.where(LANES == lane, number(cells[at]), self.registers.get(each, number(0)))
