"""Mini-world pictures per second on one core: `OMP_NUM_THREADS=1 python benchmarks/render_speed.py`."""

import time

import numpy as np

from nearid_personalize.miniworld import picture


def main(repeats: int = 5, pictures: int = 100) -> None:
    """Print minimum, median and maximum over repeats."""
    picture("train", 0)
    rates = []
    for repeat in range(repeats):
        started = time.perf_counter()
        for index in range(pictures):
            picture("train", repeat * pictures + index, wide=index % 2 == 0)
        rates.append(pictures / (time.perf_counter() - started))
    print(f"images/s: min {min(rates):.0f}, median {np.median(rates):.0f}, max {max(rates):.0f} (n = {repeats})")


if __name__ == "__main__":
    main()
