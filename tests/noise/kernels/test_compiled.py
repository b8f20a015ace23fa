"""The Triton kernels, compiled for A100 and H100 class GPUs: nothing spills, and enough programs fit.

What each takes: ``PYTHONPATH=. python tests/noise/kernels/test_compiled.py``
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from compiling import Resources, compiled, why_not

from swaft.noise.loss.options import LossOptions

pytestmark = [pytest.mark.unit, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

REGISTERS = 65536
"""Of a multiprocessor, both generations."""

EVERYTHING = LossOptions(label_smoothing=0.1, z_loss=1e-2, logit_scale=0.7, softcap=30.0, ce_on_noised=True)
ROW_KERNELS = {
    "R3F": (LossOptions(), "difference"),
    "R3F, fp32 gradients, noised side detached": (LossOptions(detach="noised"), "clean fp32"),
    "R3F, rows not aligned": (LossOptions(), "difference unaligned"),
    "R-Drop": (LossOptions(form="direct", ce_on_noised=True), "direct"),
    "T5 with smoothing": (LossOptions(label_smoothing=0.1, logit_scale=0.044), "difference"),
    "everything": (EVERYTHING, "difference biased"),
    "everything, statistics only": (EVERYTHING, "none biased"),
}
GRADIENTS = {"none": 0, "clean": 1, "direct": 2, "difference": 3}
"""How many of G, G' and their sum are written."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def row_kernel(name: str, capability: int, folder: Path) -> Resources:
    """What a variant of the row kernel takes of a GPU of that generation."""
    from swaft.noise.loss import rows_triton
    from swaft.noise.loss.rows import RowGradients

    options, how = ROW_KERNELS[name]
    wanted = GRADIENTS[how.split()[0]]
    buffers = [torch.empty(0)] * wanted + [None] * (3 - wanted)
    gradients = RowGradients(*buffers) if wanted else None  # type: ignore[arg-type]
    biased = "biased" in how
    length = "i32" if "unaligned" in how else "i32:16"
    types = dict.fromkeys(("raw", "raw_noise", "ce_weights", "kl_weights", "statistics"), "*fp32")
    types |= {"labels": "*i64"} | ({"bias": "*fp32"} if biased else {})
    kinds = ("clean", "noised", "total")
    element = "*fp32" if "fp32" in how else "*bf16"
    types |= {f"{kind}_gradient": element for kind in kinds[:wanted]}
    types |= dict.fromkeys(("num_classes", "raw_stride", "noise_stride"), length) | {"num_rows": "i32"}
    types |= {f"{kind}_stride": length for kind in kinds}
    types |= dict.fromkeys(("scale", "cap", "smoothing", "z_loss"), "fp32")
    return compiled(
        rows_triton._rows_kernel,
        types,
        rows_triton.variant(options, biased=biased, gradients=gradients),
        capability,
        folder,
        num_warps=rows_triton.WARPS,
        maxnreg=rows_triton.REGISTERS,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ROW_KERNELS)
def test_two_programs_of_the_row_kernel_fit_a_multiprocessor(name, capability, tmp_path):
    from swaft.noise.loss import rows_triton

    taken = row_kernel(name, capability, tmp_path)
    threads = 32 * rows_triton.WARPS
    assert 2 * threads * taken.registers <= REGISTERS
    assert taken.spilled == 0
    assert ".f64" not in taken.ptx  # a Python number that became a double would slow everything


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("noise", ["uniform", "normal"])
def test_the_noise_kernel_fuses_no_product_with_a_sum(noise, capability, tmp_path):
    from swaft.noise import philox_triton

    taken = compiled(
        philox_triton._noise_kernel,
        {
            "embedding": "*bf16",
            "out": "*fp32",
            "sigma": "*fp32",
            "numel": "i32:16",
            "stream": "i64",
            "first_counter": "i32",
        },
        {"NORMAL": noise == "normal", "COUNTERS": philox_triton.COUNTERS},
        capability,
        tmp_path,
        num_warps=philox_triton.WARPS,
        enable_fp_fusion=False,
    )
    assert taken.spilled == 0
    assert taken.registers <= 64
    assert "fma" not in taken.ptx
    assert "div.full" not in taken.ptx  # the approximate quotient
    assert ".f64" not in taken.ptx


if __name__ == "__main__":
    for name in ROW_KERNELS:
        for capability in (80, 90):
            with TemporaryDirectory() as folder:
                taken = row_kernel(name, capability, Path(folder))
            print(f"sm_{capability}  {taken.registers:4} registers  {taken.spilled:4} bytes spilled  {name}")
