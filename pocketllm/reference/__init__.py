"""Plain NumPy twins of every kernel: the same names and signatures, clear instead of fast."""

from pocketllm.reference.feedback import encode_feedback
from pocketllm.reference.inference import decode_row_list, decode_rows, matmul
from pocketllm.reference.search import distances, index_max, nearest, pack, unpack

__all__ = [
    "decode_row_list",
    "decode_rows",
    "distances",
    "encode_feedback",
    "index_max",
    "matmul",
    "nearest",
    "pack",
    "unpack",
]
