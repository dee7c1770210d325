"""Sizes of launches. Triton has both functions too, but on the host its newer ones take microseconds a call."""


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n (at least 1) or more."""
    return 1 << (n - 1).bit_length()
