"""What the benchmarks time with."""

from genkit.measuring import added_bytes, seconds

__all__ = ["added_bytes", "seconds"]
