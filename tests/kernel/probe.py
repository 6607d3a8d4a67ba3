"""Writes a page to a file again and again, past the page cache, and prints when that took long and how long.

python3 probe.py FILE STOP: until the file STOP exists. Lines are the time it began (seconds since 1970) and seconds.
"""

import mmap
import os
import sys
import time

LONG_S = 0.05


def main(path: str, stop: str) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_DSYNC)
    count = 0
    while not os.path.exists(stop):
        count += 1
        page[:8] = count.to_bytes(8, "big")
        begun = time.time()
        os.pwrite(descriptor, page, 0)
        took = time.time() - begun
        if took >= LONG_S:
            print(f"{begun:.3f} {took:.3f}", flush=True)
        time.sleep(0.005)


if __name__ == "__main__":
    main(*sys.argv[1:])
