"""Bytes in binary units: 1 GiB = 2^30 bytes."""

GIB, MIB, KIB = 2**30, 2**20, 2**10


def size(count: int) -> str:
    """Bytes for people: 1,536 is "1.50 KiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} bytes"


def amount(count: int) -> str:
    """Bytes for people in GiB, and in MiB or KiB below a tenth of the unit."""
    unit, name = (GIB, "GiB") if count >= GIB / 10 else (MIB, "MiB") if count >= MIB / 10 else (KIB, "KiB")
    return f"{count / unit:.2f} {name}"
