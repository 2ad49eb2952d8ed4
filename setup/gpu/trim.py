"""Empties the machine code for other GPUs in a library: trim.py LIBRARY OUT ARCHITECTURE, as 90 for Hopper.

The file keeps its length and every header, so that CUDA still finds and skips what it has no use for; what
was emptied packs to nothing. A library with a fat binary has, from its magic number on, its header (version,
length of the header, length of all entries) and entries (kind, length of the header, length of the code,
architecture at byte 28).
"""

import struct
import sys

MAGIC = struct.pack("<I", 0xBA55ED50)
library, out, kept = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = bytearray(open(library, "rb").read())
n_kept = at = 0
while (at := data.find(MAGIC, at)) >= 0:
    version, header, length = struct.unpack_from("<HHQ", data, at + 4)
    if at % 8 or version != 1 or header != 16 or at + header + length > len(data):
        at += 4
        continue
    entry, end = at + header, at + header + length
    while entry < end:
        _, _, header, length = struct.unpack_from("<HHIQ", data, entry)
        (architecture,) = struct.unpack_from("<I", data, entry + 28)
        if architecture == kept:
            n_kept += 1
        else:
            data[entry + header:entry + header + length] = bytes(length)
        entry += header + length
    at = end
if n_kept == 0:
    sys.exit(f"error: {library} has nothing for architecture {kept}")
with open(out, "wb") as file:
    file.write(data)
