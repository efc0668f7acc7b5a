"""Run all benchmarks, print their tables, and write those of docs."""

import time

from . import loss, quality_per_second, rollouts, servers, step, tables

if __name__ == "__main__":
    for part in (loss, rollouts, step, servers, quality_per_second):
        start = time.perf_counter()
        part.main()
        print(f"\n({part.__name__}: {(time.perf_counter() - start) / 60:.1f} minutes)")
    tables.main()
