"""What a compression will do before it does it: shapes, codecs, size, time and memory."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import trellis
from .allocate import Rate, Rung, Shape, allocate, codec_bits, is_symmetric, payload_bits
from .config import PocketConfig
from .errors import PocketError
from .layout import Dense, Target, subvector_count, walk
from .schema import CodecSpec, row_stride_bytes
from .trellis_bits import Sharing, expected_error

if TYPE_CHECKING:
    from torch import nn

DEFAULT_BITS = 3.0
WINDOW = 512
# A codec is shared by every layer's tensor of one role when its stored bits stay below this share
# of the bits of their indices, and by the whole model otherwise.
CODEC_SHARE = 0.02
# Sub-vectors a codec is trained on: this many, or so many a codeword, whichever is more.
TRAINING_SUBVECTORS = 2**18
TRAINING_PER_CODEWORD = 64
# What a codec's training costs: searches over its sample (k-means, epochs, refinement), and
# operations a sub-vector and parameter pair of all epochs.
SEARCHES = 30
STEP_FLOPS = 2000
# Times a sub-vector is chosen under second moments; forward passes of a calibration (second
# moments and the layer again), with what surrounds the products.
CHOICES = 3
PASSES = 4
# Tokens that sensitivities are found from, at most, and what forward and backward passes over them
# cost in forward passes.
SENSITIVITY_TOKENS = 2048
BACKWARD = 5
# Bytes that the libraries take, what a layer computes on the windows at hand, and what is in memory
# of a matrix while it is encoded.
LIBRARIES = 450 * 2**20
ACTIVATIONS = 300 * 2**20
ENCODING = 160 * 2**20
# Rows x columns that codecs and the dense layer are timed with: the dense one larger than caches
# are, as models are.
TIMED, TIMED_DENSE = (1024, 4096), (4096, 4096)
# Name of the one codec of trellis codes.
TRELLIS = "trellis"
# Operations that levels take to fit, in weights that are coded once.
FIT_WEIGHTS = 50 * 2**16
# Columns get bits of their own where that is predicted to leave at most this share of the harm, at
# so many bits.
WORTHWHILE, WORTHWHILE_BITS = 0.9, 3.0
# Bytes of a safetensors header entry and of its checksum, besides twice the tensor's name.
ENTRY_BYTES = 140


@dataclasses.dataclass
class Plan:
    """A compression's decisions and predictions.

    Attributes:
        targets: matrices to compress.
        dense: matrix-shaped parameters that stay dense, with reasons.
        codecs: codec name -> specification.
        codec_of: target name -> codec name.
        rates: target name -> rate of its trellis codes, if it has such.
        costs: names of those whose columns have bits of their own -> (in,) what an error in each
            column costs.
        dense_bytes: bytes of everything stored as it is.
        bytes: predicted size of all weight files.
        bytes_bf16: size of the dense model's weights in bf16, tied matrices once.
        bits_per_weight: predicted, over the compressed matrices, codecs and scales included.
        memory: predicted peak memory in bytes.
        seconds: predicted wall time, or None before it was measured.
        speeds: codec name -> how many times as fast as torch's bfloat16 layer it multiplies one
            token (:func:`predict_speeds`), or None before it was measured.
    """

    targets: list[Target]
    dense: list[Dense]
    codecs: dict[str, CodecSpec]
    codec_of: dict[str, str]
    rates: dict[str, Rate]
    costs: dict[str, np.ndarray]
    dense_bytes: int
    bytes: int
    bytes_bf16: int
    bits_per_weight: float
    memory: int
    seconds: float | None = None
    speeds: dict[str, float] | None = None

    @property
    def weights(self) -> int:
        """Weights the compressed matrices represent."""
        return sum(t.weights for t in self.targets)


@dataclasses.dataclass(frozen=True)
class Harm:
    """What errors in one matrix do (:func:`pocketllm.sensitivity.sensitivities`).

    Attributes:
        whole: of a relative squared error of 1 in every row.
        cost: (in,) share of each column in it.
        energy: (in,) mean square of each column, 1 on average.
    """

    whole: float
    cost: np.ndarray
    energy: np.ndarray


def make_plan(
    model: nn.Module, config: PocketConfig, harm_of: Mapping[str, Harm] | None = None
) -> Plan:
    """Decide what is compressed, with which codecs, and predict the size.

    Args:
        model: its modules, with or without storage.
        config: settings.
        harm_of: what errors of each matrix do; None before that is known.

    Raises:
        PocketError: nothing to compress, or a size that cannot be met.
    """
    targets, dense = walk(model, embeddings=config.embeddings, skip=config.modules_to_not_convert)
    weights = sum(t.weights for t in targets)
    if not weights:
        raise PocketError("model: no linear layer to compress was found in it")
    dense_bytes, bytes_bf16 = _dense_bytes(model, targets)
    if config.codebook is not None:
        assert config.subvector is not None
        shapes: dict[str, Rung] = {
            t.name: Shape(config.subvector, config.codebook) for t in targets
        }
        shares: dict[str, Sharing] = {}
    else:
        budget = _budget_bits(config, targets, dense_bytes)
        shares = _shares(config, targets, harm_of)
        shapes = _allocate(config, targets, budget, harm_of, shares)
    codecs, codec_of = _codecs(config, targets, shapes)
    rates = {name: rung for name, rung in shapes.items() if isinstance(rung, Rate)}
    bits = sum(map(codec_bits, codecs.values())) + sum(
        payload_bits(
            t,
            shapes[t.name],
            row_scale=config.row_scale,
            row_shift=config.row_shift,
            shares=shares.get(t.name),
        )
        for t in targets
    )
    return Plan(
        targets=targets,
        dense=dense,
        codecs=codecs,
        codec_of=codec_of,
        rates=rates,
        costs={n: harm_of[n].cost for n in shares if n in rates and harm_of},
        dense_bytes=dense_bytes,
        bytes=dense_bytes + bits // 8 + _entry_bytes(targets),
        bytes_bf16=bytes_bf16,
        bits_per_weight=bits / weights,
        memory=_memory(model, config, targets),
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """Predicted seconds of the parts of a compression.

    Attributes:
        codecs: codec name -> training it.
        matrices: target name -> encoding it.
        calibration: all passes over the calibration text.
        sensitivity: finding out what errors of each matrix harm.
    """

    codecs: dict[str, float]
    matrices: dict[str, float]
    calibration: float
    sensitivity: float

    @property
    def compression(self) -> float:
        """All parts but the sensitivity."""
        return sum(self.codecs.values()) + sum(self.matrices.values()) + self.calibration

    @property
    def total(self) -> float:
        """All parts."""
        return self.compression + self.sensitivity


def predict_work(plan: Plan, config: PocketConfig) -> Work:
    """Predicted seconds on this machine, from short measurements of its kernels."""
    search, flops = _seconds_per_search_unit(), _matmul_flops()
    step = _seconds_per_coded_weight() if plan.rates else 0.0
    sub_vectors = dict.fromkeys(plan.codecs, 0)
    matrices = {}
    for target in plan.targets:
        codec = plan.codecs[plan.codec_of[target.name]]
        if codec.is_trellis:
            matrices[target.name] = target.weights * step
            if config.calibration is not None:
                matrices[target.name] += target.weights * target.shape[1] / flops
            continue
        count = (
            target.weights // target.shape[1] * subvector_count(target.shape[1], codec.subvector)
        )
        sub_vectors[codec.name] += count
        matrices[target.name] = search * count * codec.codebook * codec.subvector
        if config.calibration is not None:
            matrices[target.name] *= CHOICES
            matrices[target.name] += 2 * CHOICES * target.weights * target.shape[1] / flops
    codecs = {}
    for name, codec in plan.codecs.items():
        if codec.is_trellis:
            codecs[name] = FIT_WEIGHTS * step
            continue
        sample = min(sub_vectors[name], training_subvectors(codec.codebook))
        codecs[name] = search * SEARCHES * sample * codec.codebook * codec.subvector
        codecs[name] += sample * STEP_FLOPS * codec.hidden * codec.subvector / flops
    tokens = config.calibration_windows * WINDOW if config.calibration is not None else 0
    looked_at = 0 if config.codebook is not None else SENSITIVITY_TOKENS
    calibration = PASSES * 2 * plan.weights * tokens / _pass_flops(learn=False)
    sensitivity = BACKWARD * 2 * plan.weights * looked_at / _pass_flops(learn=True)
    return Work(codecs, matrices, calibration, sensitivity)


def predict_speeds(plan: Plan, config: PocketConfig) -> dict[str, float]:
    """How many times as fast as torch's bfloat16 layer each codec multiplies one token.

    Measured on this machine with random matrices, in this thread's CPU time: let torch use one.
    """
    import torch

    rows, columns = TIMED_DENSE
    token = torch.ones(1, columns)
    dense = torch.ones(rows, columns, dtype=torch.bfloat16)
    half = token.bfloat16()
    product = _fastest(lambda: torch.nn.functional.linear(half, dense), time.thread_time)
    expected = product * TIMED[0] * TIMED[1] / (rows * columns)
    kinds = {name: dataclasses.replace(codec, name="") for name, codec in plan.codecs.items()}
    rates = [rate.quarters for rate in plan.rates.values()]
    rate = Rate(round(sum(rates) / len(rates))) if rates else None
    speeds = {
        k: expected / _product_seconds(k, rate, config.prefer, token.numpy())
        for k in set(kinds.values())
    }
    return {name: speeds[kind] for name, kind in kinds.items()}


def _product_seconds(spec: CodecSpec, rate: Rate | None, prefer: str, token: np.ndarray) -> float:
    """Seconds of one token's product with a random matrix, in trellis codes of this rate."""
    from . import kernels
    from .stored import with_signs

    rows, columns = TIMED
    random = np.random.default_rng(0)
    scale = np.ones(rows, np.float32)
    if spec.is_trellis:
        assert rate is not None
        size = trellis.payload_bytes(rate.rate, rows, columns)
        codes = random.integers(0, 256, size, dtype=np.uint8)
        blocks, extra = trellis.block_bits(rate.rate, columns)
        levels = kernels.TrellisView(blocks, extra, np.ones(trellis.MAGNITUDES, np.int8))
        return _fastest(lambda: kernels.matmul(token, codes, rows, levels, scale), time.thread_time)
    stride = row_stride_bytes(columns, spec.subvector, spec.index_bits)
    packed = random.integers(0, 256, rows * stride, dtype=np.uint8)
    table: np.ndarray = np.ones((spec.codebook, spec.subvector), np.float32)
    decoder = None
    if spec.storage == "table-int8":
        if is_symmetric(prefer, Shape(spec.subvector, spec.codebook)):
            table = with_signs(table[: spec.codebook >> spec.subvector])
        table = table.astype(np.int8)
    elif spec.storage == "decoder":
        parts = {name: shape for name, (_, shape) in spec.tensors().items()}
        decoder = np.full(parts["decoder"], 0.1, np.float32)
    view = kernels.CodecView(
        spec.subvector, spec.codebook, spec.index_bits, table, 1.0, decoder, spec.hidden, spec.norm
    )
    return _fastest(lambda: kernels.matmul(token, packed, rows, view, scale), time.thread_time)


def training_subvectors(codewords: int) -> int:
    """How many sub-vectors a codec is trained on."""
    return max(TRAINING_SUBVECTORS, TRAINING_PER_CODEWORD * codewords)


def _spec(config: PocketConfig, shape: Rung, name: str = "") -> CodecSpec:
    if isinstance(shape, Rate):
        return CodecSpec.trellis(name)
    storage = "table-float16" if config.table_dtype == "float16" else "table-int8"
    if config.norm == "rln":
        storage = "decoder"
    return CodecSpec(name, shape.subvector, shape.codewords, config.hidden, config.norm, storage)


def _dense_bytes(model: nn.Module, targets: list[Target]) -> tuple[int, int]:
    compressed = {id(model.get_submodule(t.name).weight) for t in targets}
    kept, bf16, seen = 0, 0, set()
    for parameter in model.parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        bf16 += 2 * parameter.numel()
        if id(parameter) not in compressed:
            kept += parameter.numel() * parameter.element_size()
    return kept, bf16


def _entry_bytes(targets: list[Target]) -> int:
    return 4096 + sum(2 * (2 * len(t.name) + ENTRY_BYTES) for t in targets)


def _budget_bits(config: PocketConfig, targets: list[Target], dense_bytes: int) -> float:
    weights = sum(t.weights for t in targets)
    if config.target_size is None:
        return (config.bits if config.bits is not None else DEFAULT_BITS) * weights
    room = config.target_size - dense_bytes - _entry_bytes(targets)
    if room <= 0:
        hint = "" if config.embeddings else ": compress the embeddings too (--embeddings on)"
        raise PocketError(
            f"target_size: {config.target_size:,} bytes cannot be met, "
            f"what stays dense takes {dense_bytes:,}{hint}"
        )
    return 8.0 * room


def _share(config: PocketConfig, shape: Shape, bits: float) -> str:
    """Who shares a codec; where that is "auto", the bits of the role's indices decide."""
    if config.share != "auto":
        return config.share
    return "type" if codec_bits(_spec(config, shape)) <= CODEC_SHARE * bits else "model"


def _group_names(
    config: PocketConfig, targets: Sequence[Target], shapes: Mapping[str, Rung]
) -> dict[str, str]:
    """Target name -> name of the group that shares a codec, of those that have the same shape; all
    trellis codes share one."""
    by_role: dict[tuple[str, Shape], int] = {}
    for target in targets:
        shape = shapes[target.name]
        if not target.tied_to and isinstance(shape, Shape):
            key = target.role, shape
            by_role[key] = by_role.get(key, 0) + target.weights
    share_of = {
        (role, shape): _share(config, shape, weights * shape.rate)
        for (role, shape), weights in by_role.items()
    }
    names = {}
    for target in targets:
        shape = shapes[target.name]
        if target.tied_to:
            continue
        if isinstance(shape, Rate):
            names[target.name] = TRELLIS
            continue
        share = share_of[target.role, shape]
        names[target.name] = {
            "model": "shared",
            "type": target.role.replace(".", "_"),
            "tensor": target.name.replace(".", "_"),
        }[share]
    return names | {t.name: names[t.tied_to] for t in targets if t.tied_to}


def _shares(
    config: PocketConfig, targets: list[Target], harm_of: Mapping[str, Harm] | None
) -> dict[str, Sharing]:
    """Names of the targets whose columns get bits of their own -> how they share them."""
    shares: dict[str, Sharing] = {}
    if not config.has_trellis or harm_of is None:
        return shares
    for target in targets:
        if target.tied_to or target.kind == "embedding":
            continue
        rows, columns = target.shape
        harm = harm_of[target.name]
        own = Sharing(harm.cost * harm.energy)
        left = WORTHWHILE_BITS - 8 / rows  # the byte that each column takes
        if own.error(int(left * columns / 8)) < WORTHWHILE * expected_error(WORTHWHILE_BITS):
            shares[target.name] = own
    return shares


def _allocate(
    config: PocketConfig,
    targets: list[Target],
    budget: float,
    harm_of: Mapping[str, Harm] | None,
    shares: Mapping[str, Sharing],
) -> dict[str, Rung]:
    owners = [t for t in targets if not t.tied_to]
    return allocate(
        targets,
        budget,
        spec_of=lambda shape: _spec(config, shape),
        row_scale=config.row_scale,
        row_shift=config.row_shift,
        groups_of=lambda shapes: _group_names(config, owners, shapes),
        harm_of=None if harm_of is None else {name: h.whole for name, h in harm_of.items()},
        shares_of=shares,
        ladder=TRELLIS if config.has_trellis else config.prefer,
    )


def _codecs(
    config: PocketConfig, targets: list[Target], shapes: dict[str, Rung]
) -> tuple[dict[str, CodecSpec], dict[str, str]]:
    codecs: dict[str, CodecSpec] = {}
    codec_of: dict[str, str] = {}
    sub_vectors: dict[str, int] = {}
    groups = _group_names(config, targets, shapes)
    for target in targets:
        shape = shapes[target.name]
        if isinstance(shape, Rate):
            codecs[TRELLIS] = _spec(config, shape, TRELLIS)
            codec_of[target.name] = TRELLIS
            continue
        name = f"{groups[target.name]}_d{shape.subvector}k{shape.codewords}"
        codecs[name] = _spec(config, shape, name)
        codec_of[target.name] = name
        rows, columns = target.shape
        if not target.tied_to:
            sub_vectors[name] = sub_vectors.get(name, 0) + rows * subvector_count(
                columns, shape.subvector
            )
    for name, count in sub_vectors.items():
        if codecs[name].codebook > count:
            raise PocketError(
                f"codebook: {codecs[name].codebook} codewords for {count} sub-vectors of {name}: "
                'take a smaller codebook, shorter sub-vectors, or share one codec (share="model")'
            )
    return codecs, codec_of


def _memory(model: nn.Module, config: PocketConfig, targets: list[Target]) -> int:
    """Peak of a model that is read from its files, the libraries included."""
    layers: dict[str, list[Target]] = {}
    for target in targets:
        number = re.search(r"\.\d+\.", target.name)
        if number is not None:
            layers.setdefault(target.name[: number.end()], []).append(target)
    peak = ENCODING
    for layer in layers.values():
        weights = 4 * sum(t.weights for t in layer)
        widths = {t.shape[1] for t in layer}
        # Distinct inputs are about as many as the widths a layer's matrices have, and two more.
        moments = 4 * (sum(w * w for w in widths) + 2 * min(widths) ** 2)
        factors = 2 * 4 * max(widths) ** 2
        if config.codebook is None:  # the sensitivities: forwards and backwards
            peak = max(peak, weights + 2 * ACTIVATIONS)
        if config.calibration is not None:
            peak = max(peak, weights + moments + ACTIVATIONS, moments + factors + ENCODING)
    return LIBRARIES + peak


def _seconds_per_search_unit() -> float:
    """Seconds of one (query x codeword x dimension) of the nearest-codeword search."""
    from . import kernels

    generator = np.random.default_rng(0)
    queries = generator.standard_normal((16384, 4), np.float32)
    codebook = generator.standard_normal((1024, 4), np.float32)
    return _fastest(lambda: kernels.nearest(queries, codebook)) / (queries.size * len(codebook))


def _seconds_per_coded_weight() -> float:
    """Seconds of choosing the trellis codes of one weight, without feedback."""
    from . import kernels

    rows, columns = 512, 16
    x = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    bits, level = np.full(columns, 3, np.uint8), np.ones(trellis.MAGNITUDES, np.float32)
    weight, factor = np.ones(rows, np.float32), np.ones(columns, np.float32)
    return (
        _fastest(lambda: kernels.encode_trellis(x, weight, None, bits, 0, factor, level)) / x.size
    )


def _matmul_flops() -> float:
    import torch

    a = torch.ones(512, 512)
    return 2 * 512**3 / _fastest(lambda: a @ a)


def _pass_flops(*, learn: bool) -> float:
    """Of a layer's linears where a model is run for its activations, and with ``learn`` for its
    gradients."""
    import torch

    from .precision import linear_dtype, rounded_factors, rounded_linears

    linear, x = torch.nn.Linear(512, 512, bias=False), torch.ones(512, 512)
    with rounded_factors(), torch.set_grad_enabled(learn):
        linear.to(linear_dtype(linear))
        with rounded_linears(linear):
            return 2 * 512**3 / _fastest(lambda: linear(x))


def _fastest(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    call()
    times = []
    for _ in range(3):
        start = clock()
        call()
        times.append(clock() - start)
    return max(min(times), 1e-9)
