"""Plain NumPy twins of every kernel: the same names and signatures, clear instead of fast."""

from pocketllm.reference.search import distances, index_max, nearest, pack, unpack

__all__ = ["distances", "index_max", "nearest", "pack", "unpack"]
