"""Numbers in the form in which people read them."""

import math

UNKNOWN = "–"


def finite(value: object) -> float | None:
    """The value as a finite number; None if it is missing, text, infinite or NaN."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number(value: object, digits: int = 2) -> str:
    """`1.33`, or a dash if it is not a finite number."""
    known = finite(value)
    return UNKNOWN if known is None else f"{known:.{digits}f}"


def amount_of_bytes(value: object) -> str:
    """`4.2 MB`, in powers of 1000."""
    known = finite(value)
    if known is None:
        return UNKNOWN
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(known) < 999.5:
            return f"{known:.3g} {unit}"
        known /= 1000
    return f"{known:.4g} TB"


def duration(value: object) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`, from seconds."""
    known = finite(value)
    if known is None:
        return UNKNOWN
    if known < 9.95:
        return f"{known:.1f} s"
    seconds = round(known)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
