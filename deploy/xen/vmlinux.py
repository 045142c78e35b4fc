"""Takes the ELF image out of a compressed Linux kernel: vmlinux.py VMLINUZ OUTPUT

Xen and libxl load an ELF kernel as it is; a compressed one is first unpacked by emulated code, which takes seconds.
The fields read are those of the x86 boot protocol, version 2.08: setup_sects at 0x1f1, version at 0x206,
payload_offset at 0x248 and payload_length at 0x24c.
"""

import lzma
import struct
import subprocess
import sys
import zlib


def unpack_zstd(payload):
    # The stream is followed by its unpacked length, four bytes, at which the program complains after all is written.
    return subprocess.run(["zstd", "-dcq"], input=payload[:-4], stdout=subprocess.PIPE, check=True).stdout


UNPACKERS = {
    b"\x28\xb5\x2f\xfd": unpack_zstd,
    b"\xfd7zXZ\x00": lambda payload: lzma.LZMADecompressor().decompress(payload),
    b"\x1f\x8b": lambda payload: zlib.decompressobj(31).decompress(payload),
}


def main():
    with open(sys.argv[1], "rb") as file:
        image = file.read()
    version, = struct.unpack_from("<H", image, 0x206)
    if image[0x202:0x206] != b"HdrS" or version < 0x208:
        sys.exit(f"{sys.argv[1]} is no Linux kernel of boot protocol 2.08 or newer")
    start, length = struct.unpack_from("<II", image, 0x248)
    start += ((image[0x1F1] or 4) + 1) * 512
    payload = image[start : start + length]
    for magic, unpack in UNPACKERS.items():
        if payload.startswith(magic):
            kernel = unpack(payload)
            break
    else:
        sys.exit(f"{sys.argv[1]} is compressed in an unknown way: its payload starts with {payload[:6].hex()}")
    if not kernel.startswith(b"\x7fELF"):
        sys.exit(f"the payload of {sys.argv[1]} is no ELF image")
    with open(sys.argv[2], "wb") as file:
        file.write(kernel)


main()
