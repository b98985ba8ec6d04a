"""placeholder"""


def suite() -> None:
    """Placeholder."""
