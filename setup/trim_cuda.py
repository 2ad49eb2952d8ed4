"""Empties a CUDA library of the code for other GPUs: trim_cuda.py LIBRARY SM OUT

Every kernel stands in a library once for each architecture. What is emptied is zeros in its place, so that
nothing moves and the driver, which reads the part of its own architecture alone, never meets them; and zeros
pack into nothing.
"""

import struct
import sys
from pathlib import Path

# A container of code: magic, version, bytes of its header, bytes of what follows.
CONTAINER = struct.Struct("<IHHQ")
MAGIC, VERSION = 0xBA55ED50, 1
# One part of it: kind, version, bytes of its header, bytes of its code; at ARCHITECTURE, whose it is.
PART = struct.Struct("<HHIQ")
ARCHITECTURE = 28


def trim(data, sm):
    """Empties the parts of `data` that are not of `sm`; bytes kept and emptied."""
    magic, kept, emptied, at = struct.pack("<I", MAGIC), 0, 0, 0
    while (at := data.find(magic, at)) >= 0:
        _, version, header, size = CONTAINER.unpack_from(data, at)
        if version != VERSION or header != CONTAINER.size:
            at += len(magic)
            continue
        at += header
        end = at + size
        while at < end:
            _, _, header, size = PART.unpack_from(data, at)
            (architecture,) = struct.unpack_from("<I", data, at + ARCHITECTURE)
            if header < ARCHITECTURE + 4 or at + header + size > end:
                sys.exit(f"error: the code at {at} is not laid out as expected")
            if architecture == sm:
                kept += size
            else:
                data[at + header : at + header + size] = bytes(size)
                emptied += size
            at += header + size
    return kept, emptied


def main():
    library, sm, out = sys.argv[1:]
    data = bytearray(Path(library).read_bytes())
    kept, emptied = trim(data, int(sm))
    if not kept:
        sys.exit(f"error: {library} has no code for sm_{sm}")
    Path(out).write_bytes(data)
    print(f"{library}: {kept} bytes of code for sm_{sm} kept, {emptied} of others emptied")


if __name__ == "__main__":
    main()
