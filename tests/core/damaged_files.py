"""The bytes of files of arrays, whole, damaged and strange."""

import io
import zipfile

import numpy as np


def npz_of(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def array_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def damaged_header():
    """One byte of an array's header: numpy reads it before the checksum of a long array is known."""
    data = bytearray(npz_of(norm=np.ones(9999, "f4")))
    data[data.index(b", }") + 2] = 0x82
    return bytes(data)


def encrypted():
    """Says of an array that it is encrypted, in both of its headers."""
    data = bytearray(zip_of(**{"norm__bias.npy": array_file(np.ones(3))}))
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1
    return bytes(data)


def huge_header():
    """Says of a few bytes that they are 36 terabytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    return buffer.getvalue()


def zip_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()
