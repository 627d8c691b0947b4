"""Bytes in words. Everywhere in this project a kB, MB or GB is 10^3, 10^6 or 10^9 bytes, as disks and hubs count."""

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def format_size(count: int) -> str:
    """Bytes with three digits in the unit that fits.

    Example:
        >>> format_size(812), format_size(2_100), format_size(14_130_000_000)
        ('812 bytes', '2.10 kB', '14.1 GB')
    """
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {_UNITS[unit]}"
