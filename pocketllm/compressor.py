"""Compression from end to end: train the codecs, encode every matrix, write the checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import __version__, kernels, rowcode, sensitivity
from .calibrate import Calibrator, read_windows
from .checkpoint import open_checkpoint
from .checkpoint_write import CodecData, ModuleData, check_output, write_checkpoint
from .config import PocketConfig
from .dense import load_tokenizer, meta_model, source_folder
from .encode import Factors, encode_rows, factorise, relative_errors
from .errors import PocketError
from .layout import Target, cut, naming, row_statistics
from .memory import give_back, large_blocks_apart, peak_memory
from .planning import (
    WINDOW,
    Harm,
    Plan,
    make_plan,
    predict_speeds,
    predict_work,
)
from .progress import Progress
from .report import write_model_card
from .schema import ModuleSpec
from .stored import StoredCodec
from .tensorfile import TensorSource
from .training import train_codecs
from .trellis_encode import (
    column_coding,
    column_energy,
    decode,
    encode_trellis,
    uniform_coding,
)
from .weights import Weights, open_weights
from .workspace import Workspace, fingerprint, writing

if TYPE_CHECKING:
    from torch import nn

# A dense matrix is worth a warning above this share of the file.
DENSE_SHARE = 0.02


@dataclasses.dataclass(frozen=True)
class CompressResult:
    """What a compression made.

    Attributes:
        out: the checkpoint folder.
        bits_per_weight: over the compressed matrices, codecs and scales included.
        bytes: size of all weight files.
        bytes_bf16: the dense model in bf16.
        seconds: wall time.
        peak_memory: highest resident size of the process in bytes.
        errors: module name -> relative squared error of its weights.
        output_errors: module name -> the same weighted by the calibration second moments; empty
            without calibration.
        warnings: sentences a user should read, such as collapsed codebooks or large dense parts.
    """

    out: Path
    bits_per_weight: float
    bytes: int
    bytes_bf16: int
    seconds: float
    peak_memory: int
    errors: dict[str, float]
    output_errors: dict[str, float]
    warnings: list[str]


def compress(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: PocketConfig | None = None,
    *,
    resume: bool = False,
    progress: bool = True,
) -> CompressResult:
    """Compress a Hugging Face causal LM into a checkpoint folder.

    Args:
        model: a model folder or a hub name.
        out: the folder to make; it must not exist.
        config: settings; 3 bits per weight without calibration when None.
        resume: continue an unfinished compression of the same job beside ``out``. The result is
            the same, byte for byte, as that of an undisturbed run.
        progress: show progress bars.

    Raises:
        PocketError: bad input, an unmet request, or a place that cannot be written; nothing
            half-written is left under ``out``.
    """
    started = time.monotonic()
    config = config or PocketConfig()
    # A run that was killed after its last step left both the result and the parts.
    finished = resume and Workspace.folder_of(Path(out)).is_dir() and Path(out).is_dir()
    path = Path(out).absolute() if finished else check_output(out)
    folder = source_folder(model)
    _check_calibration(config)
    with _threads(config.workers):
        weights, notes = open_weights(folder)
        plan = make_plan(weights.model, config)
        job = {"version": __version__, "source": fingerprint(folder), **_job_settings(config)}
        with Workspace(path, job, resume=resume) as workspace:
            run = Compression(weights, folder, config, plan, workspace, progress and not finished)
            codecs, modules = run.encode_all()
            plan = run.plan
            if not finished:
                write_checkpoint(
                    path,
                    modules=modules,
                    codecs=codecs,
                    dense_tensors=weights.kept(plan.targets),
                    config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
                    quantization=quantization_record(config, plan, weights.model),
                    copy_from=folder,
                )
            with writing(path):
                write_model_card(
                    path,
                    base_model=os.fspath(model) if not Path(model).is_dir() else folder.name,
                    source=folder,
                    calibration=config.calibration and Path(config.calibration).name,
                )
            workspace.remove()
    checkpoint = open_checkpoint(path, check=False)
    return CompressResult(
        out=path,
        bits_per_weight=checkpoint.bits_per_weight,
        bytes=checkpoint.bytes,
        bytes_bf16=checkpoint.bytes_bf16,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        errors=run.errors,
        output_errors=run.output_errors,
        warnings=notes + run.warnings + _dense_warnings(plan, checkpoint.bytes),
    )


def plan(model: str | os.PathLike[str], config: PocketConfig | None = None) -> Plan:
    """What ``compress`` would do with these arguments: shapes, size, memory, time and speed.

    Raises:
        PocketError: as ``compress`` would, for everything that is known before the work.
    """
    config = config or PocketConfig()
    folder = source_folder(model)
    _check_calibration(config)
    with _threads(config.workers):
        result = make_plan(meta_model(folder), config)
        result.seconds = predict_work(result, config).total
    with _threads(1):
        result.speeds = predict_speeds(result, config)
    return result


class Compression:
    """One run over a model: its codecs, then its matrices, every finished part kept.

    Attributes:
        plan: what is done; shapes are chosen again once the sensitivities are known.
        errors: module name -> relative squared error of the weights encoded so far.
        output_errors: the same under the calibration second moments.
        warnings: sentences for the user.
    """

    def __init__(
        self,
        weights: Weights,
        folder: Path,
        config: PocketConfig,
        plan: Plan,
        workspace: Workspace,
        progress: bool,
    ) -> None:
        self.weights = weights
        self.model = weights.model
        self.folder = folder
        self.config = config
        self.plan = plan
        self.workspace = workspace
        self.errors: dict[str, float] = {}
        self.output_errors: dict[str, float] = {}
        self.warnings: list[str] = []
        self.codecs: dict[str, StoredCodec] = {}
        self._modules: dict[str, ModuleData] = {}
        self._targets = {t.name: t for t in plan.targets}
        # Calibration widens layers to float32 while they are visited.
        self._dtypes = {
            t.name: str(self.model.get_submodule(t.name).weight.dtype).removeprefix("torch.")
            for t in plan.targets
        }
        self._factored: tuple[np.ndarray, int, Factors] | None = None
        self._work = predict_work(plan, config)
        self._progress = Progress("compressing", self._work.total, progress)

    def encode_all(self) -> tuple[list[CodecData], list[ModuleData]]:
        """Train every codec and encode every matrix; returns what the file stores."""
        with self._progress:
            if self.config.codebook is None:
                self.plan = make_plan(self.model, self.config, self._sensitivities())
                self._work = predict_work(self.plan, self.config)
                self._progress.expect(self._work.compression)
            self.codecs, warnings = train_codecs(
                self.plan, self.weights, self.config, self.workspace, self._codecs_begin
            )
            self.warnings += warnings
            give_back()
            if self.config.calibration is None:
                for target in self.plan.targets:
                    self._encode(target, None)
            else:
                with large_blocks_apart():
                    self._encode_calibrated()
        codecs = [CodecData(c.spec, c.parts) for c in self.codecs.values()]
        return codecs, [self._modules[t.name] for t in self.plan.targets]

    def _codecs_begin(self, names: list[str]) -> Callable[[str, float], None]:
        work = {name: self._work.codecs[name] for name in names}
        return self._progress.steps(f"{len(names)} codecs", work)

    def _sensitivities(self) -> dict[str, Harm]:
        """What errors of each matrix harm, from the workspace or measured now."""
        arrays = self.workspace.load("sensitivities")
        if arrays is None:
            if self.config.calibration is not None:
                windows = sensitivity.shortened(self._windows(sensitivity.WINDOWS))
            else:
                vocabulary = self.model.get_input_embeddings().weight.shape[0]
                longest = window_length(self.model)
                windows = sensitivity.random_windows(vocabulary, longest, self.config.seed)
            self._progress.step("sensitivities", self._work.sensitivity)
            with self._calibrator(windows) as calibrator:
                found = sensitivity.sensitivities(
                    calibrator, self.weights, self.plan.targets, self.config.seed
                )
            give_back()
            arrays = {f"whole-{n}": np.array([harm.whole], np.float64) for n, harm in found.items()}
            arrays |= {f"cost-{n}": harm.cost for n, harm in found.items()}
            arrays |= {f"energy-{n}": harm.energy for n, harm in found.items()}
            self.workspace.store("sensitivities", arrays)
        names = [key.removeprefix("whole-") for key in arrays if key.startswith("whole-")]
        return {
            n: Harm(float(arrays[f"whole-{n}"][0]), arrays[f"cost-{n}"], arrays[f"energy-{n}"])
            for n in names
        }

    def _windows(self, count: int) -> torch.Tensor:
        """Windows of the calibration text."""
        assert self.config.calibration is not None
        return read_windows(
            self.config.calibration,
            load_tokenizer(self.folder),
            count,
            window_length(self.model),
        )

    def _calibrator(self, windows: torch.Tensor) -> Calibrator:
        return Calibrator(
            self.model,
            windows,
            self._targets,
            workers=self.config.workers,
            weights=self.weights,
            folder=self.workspace.folder,
        )

    def _encode_calibrated(self) -> None:
        windows = self._windows(self.config.calibration_windows)
        with self._calibrator(windows) as calibrator:
            work = self._work.calibration / len(calibrator) / 2
            for layer in calibrator.layers():
                calibrator.progress = self._progress.step(f"inputs of {layer.name}", work)
                done = all(self._load(self._targets[name]) for name in layer.targets)
                moments = {} if done else layer.hessians()
                give_back()
                for name in layer.targets:
                    target = self._targets[name]
                    self._encode(target, moments.pop(name, None))
                    self.weights.replace(target, functools.partial(self._decoded, target))
                self._factored = None
                give_back()
                calibrator.progress = self._progress.step(f"outputs of {layer.name}", work)
            rest = [t for t in self.plan.targets if t.name not in self._modules]
            moment = calibrator.head_hessian() if rest else None
        for target in rest:
            self._encode(target, moment if target.kind in ("embedding", "linear") else None)

    def _encode(self, target: Target, hessian: np.ndarray | None) -> None:
        """Encode one matrix and keep the part, unless the workspace has it."""
        if self._load(target):
            return
        self._progress.step(target.name, self._work.matrices[target.name])
        codec = self.codecs[self.plan.codec_of[target.name]]
        hessian = hessian if self.config.feedback else None
        encode = self._trellis if codec.spec.is_trellis else self._codewords
        with naming(target):
            factors = self._factors(hessian, codec)
            scale, shift = row_statistics(
                functools.partial(self.weights.parts, target),
                row_scale=self.config.row_scale,
                row_shift=self.config.row_shift,
            )
            arrays = encode(target, codec, scale, shift, hessian, factors)
        if shift is not None:
            arrays["shift"] = rowcode.encode(shift, signed=True)
        self.workspace.store(_part(target), arrays)
        self._load(target)

    def _codewords(
        self,
        target: Target,
        codec: StoredCodec,
        scale: np.ndarray,
        shift: np.ndarray | None,
        hessian: np.ndarray | None,
        factors: Factors | None,
    ) -> dict[str, np.ndarray]:
        """The arrays of a matrix in indices of codewords, but for row shifts."""
        packed, squares, first = [], np.zeros(4), 0
        for weight in self.weights.parts(target):
            part = slice(first, first + len(weight))
            first = part.stop
            rows = cut(
                weight, codec.spec.subvector, scale[part], None if shift is None else shift[part]
            )
            encoded = encode_rows(rows, weight, codec, hessian, factors=factors)
            packed.append(kernels.pack(encoded.index, codec.spec.index_bits).reshape(-1))
            squares += encoded.squares
        arrays: dict[str, np.ndarray] = {"packed": np.concatenate(packed), "squares": squares}
        if self.config.row_scale:
            arrays["scale"] = rowcode.encode(scale, signed=False)
        return arrays

    def _trellis(
        self,
        target: Target,
        codec: StoredCodec,
        scale: np.ndarray,
        shift: np.ndarray | None,
        hessian: np.ndarray | None,
        factors: Factors | None,
    ) -> dict[str, np.ndarray]:
        """The arrays of a matrix in trellis codes, but for row shifts."""
        parts = functools.partial(self.weights.parts, target)
        rate, cost = self.plan.rates[target.name], self.plan.costs.get(target.name)
        energy = column_energy(parts(), scale, shift)
        if cost is None:
            coding = uniform_coding(rate.rate, energy, factors)
        else:
            coding = column_coding(rate.row_bytes(len(energy)), energy, cost, factors)
        made = encode_trellis(parts, scale, shift, coding, codec.parts, hessian, factors)
        arrays = {
            "packed": made.packed,
            "squares": made.squares,
            "scale": rowcode.encode(made.scale, signed=False),
            "bits": np.atleast_1d(np.array(coding.bits, np.float64)),
        }
        if coding.codes is not None:
            arrays["columns"] = coding.codes
        return arrays

    def _factors(self, hessian: np.ndarray | None, codec: StoredCodec) -> Factors | None:
        """Those of H, made once for matrices that read the same input."""
        if hessian is None or codec.encoder is not None:
            return None
        known, subvector = self._factored, codec.spec.subvector
        again = not codec.spec.is_trellis
        if (
            known is None
            or known[0] is not hessian
            or known[1] != subvector
            or (again and known[2].fixed_feedback is None)
        ):
            known = self._factored = None
            give_back()
            known = (hessian, subvector, factorise(hessian, subvector, again=again))
            self._factored = known
            give_back()
        return known[2]

    def _load(self, target: Target) -> bool:
        """Take a matrix from the workspace; False when it is not there. A tied one needs none."""
        if target.name in self._modules:
            return True
        if target.tied_to:
            self._modules[target.name] = ModuleData(self._spec(target))
            return True
        part = self.workspace.part(_part(target))
        if part is None:
            return False
        spec = self._spec(target)
        if "bits" in part:
            bits = _array(part["bits"])
            blocks = tuple(int(b) for b in bits) if "columns" in part else float(bits[0])
            spec = dataclasses.replace(spec, bits=blocks)
        self._modules[target.name] = ModuleData(
            spec, part["packed"], part.get("scale"), part.get("shift"), part.get("columns")
        )
        error, output_error = relative_errors(_array(part["squares"]))
        self.errors[target.name] = error
        if np.isfinite(output_error):
            self.output_errors[target.name] = output_error
        return True

    def _spec(self, target: Target) -> ModuleSpec:
        return ModuleSpec(
            target.name,
            target.kind,
            target.shape,
            codec=None if target.tied_to else self.plan.codec_of[target.name],
            scale=self.config.row_scale,
            shift=self.config.row_shift,
            dtype=self._dtypes[target.name],
            tied_to=target.tied_to,
            statistics="uint8",
        )

    def _decoded(self, target: Target) -> np.ndarray:
        """The matrix that the stored one stands for, (out, in) float32."""
        data = self._modules[target.name]
        assert data.packed is not None
        codec = self.codecs[self.plan.codec_of[target.name]]
        if codec.spec.is_trellis:
            assert data.spec.bits is not None and data.scale is not None
            return decode(
                _array(data.packed),
                data.spec.bits,
                None if data.columns is None else _array(data.columns),
                codec.parts,
                rowcode.decode(_array(data.scale), signed=False),
                None if data.shift is None else rowcode.decode(_array(data.shift), signed=True),
                target.shape[1],
            )
        scale = np.ones(target.shape[0], np.float32)
        return kernels.decode_rows(
            _array(data.packed),
            target.shape[1],
            0,
            target.shape[0],
            codec.view,
            scale if data.scale is None else rowcode.decode(_array(data.scale), signed=False),
            None if data.shift is None else rowcode.decode(_array(data.shift), signed=True),
        )


def _array(part: np.ndarray | TensorSource) -> np.ndarray:
    return part if isinstance(part, np.ndarray) else part.data()


def _part(target: Target) -> str:
    return f"matrix-{target.name}"


def window_length(model: nn.Module) -> int:
    """Tokens of a calibration window: as many as the model has positions for, at most 512."""
    positions = getattr(model.config, "max_position_embeddings", None) or WINDOW
    return min(WINDOW, positions)


def quantization_record(config: PocketConfig, plan: Plan, model: nn.Module) -> dict[str, Any]:
    """How a compression was made, for its quantization_config."""
    calibration = None
    if config.calibration is not None:
        calibration = {
            "file": Path(config.calibration).name,
            "windows": config.calibration_windows,
            "window": window_length(model),
            "feedback": config.feedback,
        }
    return {
        "seed": config.seed,
        "calibration": calibration,
        "modules_to_not_convert": sorted({d.name.removesuffix(".weight") for d in plan.dense}),
    }


def _dense_warnings(plan: Plan, total: int) -> list[str]:
    """One sentence for every large matrix that stays dense for another reason than being named."""
    warnings = []
    reasons: dict[str, int] = {}
    for dense in plan.dense:
        reasons[dense.reason] = reasons.get(dense.reason, 0) + 2 * dense.weights
    for reason, size in sorted(reasons.items()):
        if size > DENSE_SHARE * total:
            names = [d.name for d in plan.dense if d.reason == reason]
            several = len(names) > 1
            what = f"{names[0]} and {len(names) - 1} more stay" if several else f"{names[0]} stays"
            warnings.append(f"{what} dense ({reason}): {size / total:.0%} of the file")
    return warnings


def _job_settings(config: PocketConfig) -> dict[str, Any]:
    """The settings a result depends on."""
    settings = config.to_dict()
    del settings["workers"]
    if config.calibration is not None:
        settings["calibration"] = hashlib.sha256(Path(config.calibration).read_bytes()).hexdigest()
    return settings


def _check_calibration(config: PocketConfig) -> None:
    if config.calibration is not None and not Path(config.calibration).is_file():
        raise PocketError(f"calibration: no file {config.calibration!r}, give a text file")


@contextmanager
def _threads(workers: int | None) -> Iterator[None]:
    """Run with the wanted number of threads in torch and, through it, in the kernels."""
    before = torch.get_num_threads()
    if workers is not None:
        torch.set_num_threads(workers)
    try:
        yield
    finally:
        torch.set_num_threads(before)
