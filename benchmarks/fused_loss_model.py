"""Predicted time of the fused loss on an H100 or H200, by which its chunks were chosen. Not measured.

python -m benchmarks.fused_loss_model

Products take the longer of their operations and of the memory they read and write; everything else is only
memory traffic, read and written once, and nothing overlaps. bf16 operands, forward and backward, all gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FLOPS = 700e12
"""Operations per second that large bf16 products reach."""
BANDWIDTH = 3e12
"""Bytes per second that kernels reach, of 3.35e12 (H100) or 4.8e12 (H200)."""
RESIDENT = 264
"""Rows that the row kernel processes at once: two programs on each of 132 multiprocessors."""
UNALIGNED = 0.5
"""Share of full speed that products reach if their rows are not a multiple of 16 bytes; a guess."""
ROW_BYTES = 22
"""Bytes per element in the row kernel: two fp32 products read twice, three bf16 gradients written."""
BUDGET = 1.8e9
"""Bytes of all tensors of size V in a chunk."""
SHAPES = ((4096, 128256), (1024, 128256), (1024, 250112), (1024, 50265), (512, 32128))
"""Hidden size d and vocabulary V."""
NUM_ROWS = 8192


@dataclass(frozen=True)
class Design:
    """How rows are put into chunks, and how often tensors of the size of W are read or written."""

    product_rows: int | None
    """Rows multiplied at a time in a chunk; None: all of them."""
    weight_bytes: int
    """Bytes per element of W, outside products: zeros, scale, cast, and the upstream gradient's factor."""
    first_is_written: bool
    """Whether the first chunk writes dW instead of adding to zeros."""
    is_padded: bool
    """Whether rows start at multiples of 64 elements."""
    two_reads: bool = True
    """Whether the row kernel reads its products twice; once, if a cluster of programs kept them."""


SIMPLE = Design(None, weight_bytes=4 + 8 + 6 + 20, first_is_written=False, is_padded=False)
CHOSEN = Design(256, weight_bytes=6 + 4, first_is_written=True, is_padded=True)
DESIGNS = {
    "simple": SIMPLE,
    "+ rows padded": replace(SIMPLE, is_padded=True),
    "+ fewer passes over W": replace(CHOSEN, product_rows=None),
    "+ two-level chunks: chosen": CHOSEN,
    "chosen, 128 rows at a time": replace(CHOSEN, product_rows=128),
    "chosen, 512 rows at a time": replace(CHOSEN, product_rows=512),
    "chosen, products read once": replace(CHOSEN, two_reads=False),
}


def chunk_rows(design: Design, vocabulary: int) -> tuple[int, int]:
    """Rows multiplied at a time, and rows of a chunk, within the budget."""
    products, gradients = 8 * vocabulary, 6 * vocabulary
    both = max(128, int(BUDGET // (products + gradients)) // 128 * 128)
    few = min(both, design.product_rows or both)
    if design.product_rows is None:
        return both, both
    return few, max(few, int((BUDGET - few * products) // gradients) // few * few)


def milliseconds(design: Design, width: int, vocabulary: int) -> dict[str, float]:
    """Milliseconds of each part, for `NUM_ROWS` rows.

    Args:
        design: design of the loss.
        width: hidden size d.
        vocabulary: V.
    """
    rows = NUM_ROWS
    few, many = (min(rows, each) for each in chunk_rows(design, vocabulary))
    flops = FLOPS if design.is_padded or vocabulary % 8 == 0 else UNALIGNED * FLOPS
    weight = vocabulary * width

    def product(operations: float, nbytes: float) -> float:
        return max(operations / flops, nbytes / BANDWIDTH)

    forward = rows / few * product(4 * few * weight, 2 * weight + 8 * few * vocabulary)
    backward = (
        rows
        / many
        * (
            product(4 * many * weight, 2 * weight + 4 * many * vocabulary)
            + product(4 * many * weight, 4 * many * vocabulary)
        )
    )
    waves = rows / few * -(-few // RESIDENT)
    kernel = waves * RESIDENT * vocabulary * (ROW_BYTES if design.two_reads else ROW_BYTES - 8) / BANDWIDTH
    additions = -(-rows // many)
    added = 8 * additions - (4 if design.first_is_written else 0)
    return {
        "products": 1e3 * (forward + backward),
        "rows kernel": 1e3 * kernel,
        "adding to dW": 1e3 * added * weight / BANDWIDTH,
        "passes over W": 1e3 * design.weight_bytes * weight / BANDWIDTH,
    }


def share_of_the_floor(design: Design, width: int, vocabulary: int) -> float:
    """The time of the six products alone, divided by that of the loss."""
    floor = 1e3 * 12 * NUM_ROWS * width * vocabulary / FLOPS
    return floor / sum(milliseconds(design, width, vocabulary).values())


def main() -> None:
    print(f"share of the six-product floor predicted, N = {NUM_ROWS}: total (parts) in ms")
    for width, vocabulary in SHAPES:
        print(f"\nd = {width}, V = {vocabulary}")
        for name, design in DESIGNS.items():
            parts = milliseconds(design, width, vocabulary)
            few, many = chunk_rows(design, vocabulary)
            listed = ", ".join(f"{part} {each:.1f}" for part, each in parts.items())
            print(
                f"  {share_of_the_floor(design, width, vocabulary):.2f}  {sum(parts.values()):6.1f} ({listed})"
                f"  {few} of {many} rows  {name}"
            )


if __name__ == "__main__":
    main()
