"""Time and memory of coverage for 1 000 000 events in three base coordinates, on one core.

`python benchmarks/coverage_million.py` prints the seconds of one call (best and worst of five) and
by how much the peak resident memory grows while one and while ten million events are streamed in
chunks of 50 000.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from flowpost.diagnostics import CoverageAccumulator, coverage


def stream(events: int, dof: int, chunk: int = 50_000) -> CoverageAccumulator:
    generator = torch.Generator().manual_seed(0)
    accumulator = CoverageAccumulator(dof)
    for _ in range(events // chunk):
        accumulator.update(torch.randn(chunk, dof, generator=generator))
    return accumulator


def peak() -> float:
    # Linux counts kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--dof", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)

    stream(100_000, options.dof).compute()
    start = peak()
    stream(options.events, options.dof).compute()
    one = peak()
    stream(10 * options.events, options.dof).compute()
    ten = peak()

    u = torch.randn(options.events, options.dof, generator=torch.Generator().manual_seed(1))
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        result = coverage(u)
        seconds.append(time.perf_counter() - begin)
    print(result)
    print(
        f"{options.events} events, d = {options.dof}, one thread: best {min(seconds):.2f} s, "
        f"worst of five {max(seconds):.2f} s"
    )
    print(
        f"streamed: peak memory {start:.0f} MiB after 100 000 events, +{one - start:.1f} MiB after "
        f"{options.events}, +{ten - start:.1f} MiB after {10 * options.events}"
    )


if __name__ == "__main__":
    main()
