"""The batch sizes that a generation server captures as CUDA graphs."""

# The original's captured batch sizes; from 288 on every 64 (its list ends at 992).
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 150, 180, 192, 224, 256, *range(288, 993, 64))


POWERS_OF_TWO = tuple(2**k for k in range(14))  # v6.0's


def cuda_graph_sizes(batch_size: int, which: str = "original") -> list[int]:
    """Batch sizes to capture as CUDA graphs: sorted, none above the batch, the batch itself the last."""
    sizes = GRAPH_SIZES if which == "original" else POWERS_OF_TWO
    return [size for size in sizes if size < batch_size] + [batch_size]
