"""How fast are the checksums that a packed expert could have: zlib's CRC-32, which it has, and hashlib's BLAKE2b?"""

import hashlib
import statistics
import time
import zlib
from collections.abc import Callable

import click
import report

CHECKSUMS: dict[str, Callable[[bytes], object]] = {
    "CRC-32": zlib.crc32,
    "BLAKE2b": lambda data: hashlib.blake2b(data).digest(),
}


def speed(checksum: Callable[[bytes], object], data: bytes) -> float:
    """GB/s of one pass."""
    began = time.perf_counter()
    checksum(data)
    return len(data) / (time.perf_counter() - began) / 1e9


@click.command()
@click.option("--mib", default=64, show_default=True, help="Size of what is summed.")
@click.option("--runs", default=9, show_default=True)
@click.option("--save", is_flag=True, help="Write benchmarks/results/checksums.json.")
def main(mib: int, runs: int, save: bool) -> None:
    """Measure both, in turn, on one thread."""
    data = bytes(range(256)) * (mib << 12)
    found: dict[str, list[float]] = {name: [] for name in CHECKSUMS}
    for _ in range(runs):
        for name, checksum in CHECKSUMS.items():
            found[name].append(speed(checksum, data))
    rows = [{"checksum": name, "GB/s": round(statistics.median(speeds), 2)} for name, speeds in found.items()]
    report.publish("checksums", rows, {"mib": mib, "runs": runs, "rows": rows}, save)


if __name__ == "__main__":
    main()
