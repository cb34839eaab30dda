"""The counters of the library, for the benchmarks and the tests."""

from una_fast.counters import FlopCounter, LiveBytes

__all__ = ["FlopCounter", "LiveBytes"]
