"""What a GPU can do at most, measured: clock and memory bandwidth, and the floors that follow."""

from dataclasses import dataclass

from visionmamba.bench.passes import gpu_seconds

EXPONENTIALS_PER_CLOCK = 16
"""Results of a multiprocessor's special-function unit in a clock, compute capability 8.0 to 12.0
(CUDA programming guide, throughput of native arithmetic instructions)."""
_CLOCKS = 2_000_000
_COPY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of one GPU."""

    num_multiprocessors: int
    """Multiprocessors."""
    clock_ghz: float
    """Clock of the multiprocessors, measured while nothing else runs; tensor cores lower it."""
    bytes_per_second: float
    """Reading and writing of a copy larger than every cache."""

    def floor_seconds(self, *, num_exponentials: int, num_bytes: int) -> float:
        """Return the longer of the times that the special-function units and the memory need.

        Assumes that every exponential is computed once, on all multiprocessors, 16 a clock each,
        and that every byte moves once at the bandwidth of a copy.
        """
        rate = self.num_multiprocessors * EXPONENTIALS_PER_CLOCK * self.clock_ghz * 1e9
        return max(num_exponentials / rate, num_bytes / self.bytes_per_second)


def measure_ceilings() -> Ceilings:
    """Measure the current GPU; takes some milliseconds and 2 GB."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = min(gpu_seconds(lambda: target.copy_(source), 10) for _ in range(3))
    wait = min(gpu_seconds(_wait, 1) for _ in range(3))
    return Ceilings(
        num_multiprocessors=properties.multi_processor_count,
        clock_ghz=_CLOCKS / wait / 1e9,
        bytes_per_second=2 * _COPY_BYTES / copy,
    )


def _wait() -> None:
    import torch

    torch.cuda._sleep(_CLOCKS)  # type: ignore[no-untyped-call]
