"""The Triton kernels, compiled for A100 and H100 class GPUs: nothing spills, and enough programs fit.

What each takes: ``PYTHONPATH=. python tests/noise/kernels/test_compiled.py``
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from compiling import Resources, compiled, why_not

from swaft.noise.loss.options import LossOptions
from swaft.noise.loss.rows import ROW_MULTIPLE, empty_rows

pytestmark = [pytest.mark.unit, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

REGISTERS = 65536
"""Of a multiprocessor, both generations."""

EVERYTHING = LossOptions(label_smoothing=0.1, z_loss=1e-2, logit_scale=0.7, softcap=30.0, ce_on_noised=True)
ROW_KERNELS = {
    "R3F": (LossOptions(), "difference"),
    "R3F, fp32 gradients, noised side detached": (LossOptions(detach="noised"), "clean fp32"),
    "R-Drop": (LossOptions(form="direct", ce_on_noised=True), "direct"),
    "T5 with smoothing": (LossOptions(label_smoothing=0.1, logit_scale=0.044), "difference"),
    "everything": (EVERYTHING, "difference biased"),
    "everything, statistics only": (EVERYTHING, "none biased"),
}
ROW_VECTORS = ("ce_weights", "kl_weights", "statistics")
GRADIENTS = {"none": 0, "clean": 1, "direct": 2, "difference": 3}
"""How many of G, G' and their sum are written."""


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def row_kernel(name: str, capability: int, folder: Path) -> Resources:
    """What a variant of the row kernel takes of a GPU of that generation."""
    from swaft.noise.loss import rows_triton

    options, how = ROW_KERNELS[name]
    types = dict.fromkeys(("raw", "raw_noise"), "*fp32") | dict.fromkeys(ROW_VECTORS, "*fp32:1")
    types |= {"labels": "*i64:1"} | ({"bias": "*fp32"} if "biased" in how else {})
    element = "*fp32" if "fp32" in how else "*bf16"
    types |= {
        f"{kind}_gradient": element for kind in ("clean", "noised", "total")[: GRADIENTS[how.split()[0]]]
    }
    types |= dict.fromkeys(("num_classes", "product_stride", "gradient_stride"), "i32")
    types |= dict.fromkeys(("scale", "cap", "smoothing", "z_loss"), "fp32")
    return compiled(
        rows_triton._rows_kernel,
        types,
        rows_triton.variant(options),
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
    # Nothing is known of V, and yet a thread reads 16 bytes at a time; alone stand weights and the label's logits.
    assert len(re.findall(r"ld\.global\.v4\.b32", taken.ptx)) >= 6
    assert len(re.findall(r"ld\.global\.b32", taken.ptx)) <= 5


def specialised(**arguments):
    """What Triton compiles the row kernel anew for, of these arguments of a launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from swaft.noise.loss import rows_triton

    kernel = rows_triton._rows_kernel
    bind = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    return bind(**arguments, **rows_triton.variant(LossOptions()), debug=False)[1]


def launch(*, count: int, classes: int, first: int) -> dict[str, object]:
    """Arguments for rows from `first` on, of vectors that begin anywhere."""
    matrices = [
        empty_rows(count, classes, dtype=dtype, device=torch.device("cpu"))
        for dtype in (torch.float32,) * 2 + (torch.bfloat16,) * 3
    ]
    labels, *weights = (
        torch.zeros(first + count, dtype=dtype)[first:]
        for dtype in (torch.int64, torch.float32, torch.float32)
    )
    names = ("raw", "raw_noise", "clean_gradient", "noised_gradient", "total_gradient")
    return dict(zip(names, matrices, strict=True)) | {
        "bias": None,
        "labels": labels,
        "ce_weights": weights[0],
        "kl_weights": weights[1],
        "statistics": torch.zeros(count, 4),
        "num_classes": classes,
        "product_stride": matrices[0].stride(0) // ROW_MULTIPLE,
        "gradient_stride": matrices[0].stride(0) // ROW_MULTIPLE,
        **dict.fromkeys(("scale", "cap", "smoothing", "z_loss"), 1.0),
    }


def test_one_compilation_serves_every_number_of_rows_and_classes_wherever_they_lie():
    usual = specialised(**launch(count=256, classes=32128, first=0))
    for count, classes, first in ((1, 50257, 1), (3, 1, 3), (17, 64, 2)):
        assert specialised(**launch(count=count, classes=classes, first=first)) == usual


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
