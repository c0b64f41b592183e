"""Plain NumPy twins of every kernel: the same names and signatures, clear instead of fast."""

from pocketllm.reference.feedback import encode_feedback
from pocketllm.reference.inference import decode_row_list, decode_rows, matmul
from pocketllm.reference.rounded import rounded_gram, rounded_linear
from pocketllm.reference.search import SearchIndex, distances, index_max, nearest, pack, unpack
from pocketllm.reference.training import (
    TrainStep,
    adam,
    cluster_sums,
    decode,
    decode_backward,
    encode,
    encode_backward,
    mlp,
    mlp_backward,
    rln,
    rln_backward,
    train_step,
)
from pocketllm.reference.trellis import encode_trellis, trellis_levels

__all__ = [
    "SearchIndex",
    "TrainStep",
    "adam",
    "cluster_sums",
    "decode",
    "decode_backward",
    "decode_row_list",
    "decode_rows",
    "distances",
    "encode",
    "encode_backward",
    "encode_feedback",
    "encode_trellis",
    "index_max",
    "matmul",
    "mlp",
    "mlp_backward",
    "nearest",
    "pack",
    "rln",
    "rln_backward",
    "rounded_gram",
    "rounded_linear",
    "train_step",
    "trellis_levels",
    "unpack",
]
