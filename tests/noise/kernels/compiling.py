"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what the assembler says of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes of a multiprocessor."""

    registers: int
    """A thread."""
    spilled: int
    """Bytes a thread, stored to local memory for want of registers."""
    shared: int
    """Bytes a program."""
    ptx: str


def why_not() -> str | None:
    """Why nothing can be compiled on this machine; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _assembler().is_file():
        return f"triton's assembler is not at {_assembler()}"
    return None


def _assembler() -> Path:
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    folder: Path,
    **options: Any,
) -> Resources:
    """Compile one variant of a kernel.

    Args:
        kernel: the jitted function.
        types: Triton's type of each run-time argument; pointers are divisible by 16 but for those with a trailing
            ``:1``, numbers are where they have a trailing ``:16``.
        constants: the compile-time arguments.
        capability: 80 or 90.
        folder: where to put the assembler's input.
        options: of the launch (num_warps, ...).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types[name].split(":")[0] if name in types else "constexpr" for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if types.get(name, ":1").startswith("*") != types.get(name, ":1").endswith((":1", ":16"))
    }
    source = ASTSource(kernel, signature, {n: constants.get(n) for n in names if n not in types}, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = folder / "kernel.ptx"
    ptx.write_text(binary.asm["ptx"])
    architecture = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    told = subprocess.run(
        [_assembler(), "-v", f"-arch={architecture}", ptx, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    registers, spilled = (re.search(p, told) for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    assert registers is not None, told
    assert spilled is not None, told
    return Resources(int(registers[1]), int(spilled[1]), binary.metadata.shared, binary.asm["ptx"])
