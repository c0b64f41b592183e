"""Compressing from the command line: the whole chain, bad input, interruptions of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import independent_reader
import numpy as np
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from pocketllm import cli
from pocketllm.allocate import FAST_LADDER, Shape
from pocketllm.checkpoint import open_checkpoint
from pocketllm.workspace import Workspace

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
# Training long enough for a signal to come in time; what asks for epochs gets codebooks.
SETTINGS = {"calibration_windows": 4, "epochs": 12}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.make(tmp_path_factory.mktemp("dense") / "tiny")


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a calibrated compression, but for the folder to make."""
    folder = tmp_path_factory.mktemp("job")
    text, config = folder / "text.txt", folder / "config.json"
    text.write_text(tiny_llama.TEXT)
    config.write_text(json.dumps(SETTINGS))
    return [
        *("--bits", "3.5", "--calibration", str(text), "--config", str(config), "--seed", "3"),
        str(model),
    ]


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of odd widths and few rows, whose down projections have inputs far apart; one of its
    matrices is zero."""
    folder = tiny_llama.make(
        tmp_path_factory.mktemp("dense") / "uneven",
        hidden=44,
        layers=2,
        intermediate_size=300,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
    )

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        spread = torch.exp(1.5 * torch.randn(300, 1, generator=torch.manual_seed(5)))
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor.mul_(spread.to(tensor.dtype))
        tensors["model.layers.1.self_attn.v_proj.weight"].zero_()

    edit_tensors(folder, edit)
    return folder


@pytest.fixture(scope="module")
def coded_job(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """As ``job``, with trellis codes."""
    folder = tmp_path_factory.mktemp("coded job")
    text, config = folder / "text.txt", folder / "config.json"
    text.write_text(tiny_llama.TEXT)
    config.write_text(json.dumps({"calibration_windows": 3}))
    return [
        *("--bits", "3.5", "--calibration", str(text), "--config", str(config), "--seed", "3"),
        str(uneven),
    ]


@pytest.fixture(scope="module")
def coded(coded_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of ``coded_job`` from start to end makes."""
    out = tmp_path_factory.mktemp("coded") / "small"
    assert cli.main(["compress", *coded_job, str(out), "--codec", "trellis"]) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that a run from start to end makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "small"
    assert cli.main(["compress", *job, str(out)]) == 0
    return out


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def partial(out: Path) -> Path:
    """Where an unfinished compression keeps its parts."""
    return out.with_name(out.name + ".partial")


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error that begins with the program's name."""
    error = capsys.readouterr().err
    (line,) = [text for text in error.splitlines() if text.startswith("pocketllm: ")]
    assert "Traceback" not in error
    return line


# A compression that waits, once some parts are stored, for a signal to end it. Whoever started the
# tests may have told them to ignore Ctrl-C.
WAITING = """
import signal, sys, time
from pocketllm import cli
from pocketllm.workspace import Workspace

store, stored = Workspace.store, []

def waiting_store(self, name, arrays):
    if len(stored) == 3:
        time.sleep(120)
    store(self, name, arrays)
    stored.append(name)

Workspace.store = waiting_store
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(sys.argv[1:]))
"""


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """A command in a process of its own, which stores three parts."""
    return subprocess.Popen(
        [sys.executable, "-c", WAITING, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "POCKETLLM_DEBUG": "0"},
    )


def stop_after_parts(process: subprocess.Popen[str], out: Path, number: int) -> str:
    """Send a signal once the parts are stored; return what was said on standard error."""
    deadline = time.monotonic() + 120
    while len(list(partial(out).glob("*.safetensors"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "it did not store its parts"
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    return said


def test_whole_chain(
    undisturbed: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    text = tmp_path / "held out.txt"
    text.write_text(tiny_llama.TEXT)

    assert cli.main(["verify", str(undisturbed)]) == 0
    assert cli.main(["inspect", str(undisturbed), "--json", str(figures)]) == 0
    inspected = json.loads(figures.read_text())
    assert set(inspected) == {"bits_per_weight", "bytes", "bytes_bf16", "tensors"}
    files = [path.stat().st_size for path in undisturbed.glob("*.safetensors")]
    assert inspected["bytes"] == sum(files)
    weights = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    assert inspected["bytes_bf16"] == 2 * weights
    assert 2 < inspected["bits_per_weight"] <= 3.5
    assert sum(row["bytes"] for row in inspected["tensors"]) < inspected["bytes"]

    capsys.readouterr()
    evaluate = ["eval", str(undisturbed), "--text", str(text), "--against", str(model)]
    assert cli.main([*evaluate, "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    assert {"perplexity", "kl", "tasks", "bits_per_weight", "bytes", "bytes_bf16"} <= set(measured)
    assert 1 < measured["perplexity"]["held out.txt"] < 1000
    assert 0 < measured["kl"]["held out.txt"] < 5
    assert measured["tasks"] == {}
    assert measured["bytes"] == inspected["bytes"]

    capsys.readouterr()
    generate = ["generate", str(undisturbed), "--prompt", "The quick", "--max-new-tokens", "5"]
    assert cli.main(generate) == 0
    first = capsys.readouterr().out
    assert first.startswith("The quick") and len(first) > len("The quick\n")
    assert cli.main(generate) == 0
    assert capsys.readouterr().out == first

    dense = tmp_path / "dense"
    assert cli.main(["decompress", str(undisturbed), str(dense)]) == 0
    restored, original = (load_file(path / "model.safetensors") for path in (dense, model))
    assert restored.keys() == original.keys()
    for name, tensor in original.items():
        assert restored[name].shape == tensor.shape and restored[name].dtype == tensor.dtype
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())


def test_dry_run_predicts_and_makes_nothing(
    job: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "plan.json"
    assert cli.main(["compress", *job, "--dry-run", "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("time", "memory", "weight files", "bits per weight"))
    assert list(tmp_path.iterdir()) == [figures]
    planned = json.loads(figures.read_text())
    made = open_checkpoint(undisturbed)
    # Shapes are chosen again when the sensitivities are known, and here rungs are coarse.
    assert planned["bits_per_weight"] == pytest.approx(made.bits_per_weight, rel=0.1)
    assert planned["bytes"] == pytest.approx(made.bytes, rel=0.1)
    assert planned["bytes_bf16"] == made.bytes_bf16
    assert planned["seconds"] > 0 and planned["memory"] > made.bytes_bf16
    assert set(planned["speeds"]) == {tensor["codec"] for tensor in planned["tensors"]}
    assert all(speed > 0 for speed in planned["speeds"].values())


def test_same_bytes_with_one_and_two_workers(
    job: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    for workers in ("1", "2"):
        out = tmp_path / workers
        assert cli.main(["compress", *job, str(out), "--workers", workers]) == 0
        assert digest(out) == digest(undisturbed)


def test_trellis_codes_of_every_kind_come_back(
    coded: Path, uneven: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Columns with bits of their own, fewer rows than the register has bits, and nothing but zeros:
    read independently, loaded, and as dense as the model was."""
    layout = open_checkpoint(coded).layout
    coded_modules = [module for module in layout.modules.values() if module.bits is not None]
    assert {codec.storage for codec in layout.codecs.values()} == {"trellis"}
    assert len(coded_modules) == len(layout.modules) == 14
    down = [module for module in coded_modules if module.name.endswith("down_proj")]
    assert all(module.shape == (44, 300) and isinstance(module.bits, tuple) for module in down)
    assert min(module.shape[0] for module in coded_modules) == 10

    matrices, _ = independent_reader.read(coded)
    original = load_file(uneven / "model.safetensors")
    for name, values in matrices.items():
        weight = original[f"{name}.weight"].double().numpy()
        found = open_checkpoint(coded).load_dequantised(name)
        np.testing.assert_allclose(found, values, rtol=2e-5, atol=2e-6)
        if name.endswith(("gate_proj", "up_proj")):
            # What 3 bits are good for, and feedback adds where inputs are alike.
            assert np.square(values - weight).sum() < 0.1 * np.square(weight).sum()
    assert not matrices["model.layers.1.self_attn.v_proj"].any()

    assert cli.main(["decompress", str(coded), str(tmp_path / "dense")]) == 0
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert dense.keys() == original.keys()
    for name, values in matrices.items():
        rounded = torch.from_numpy(values).float().bfloat16()
        torch.testing.assert_close(dense[f"{name}.weight"], rounded, rtol=2**-7, atol=1e-6)

    text, figures = tmp_path / "held out.txt", tmp_path / "figures.json"
    text.write_text(tiny_llama.TEXT[:2000])
    arguments = ["--text", str(text), "--against", str(tmp_path / "dense"), "--json", str(figures)]
    assert cli.main(["eval", str(coded), *arguments]) == 0
    assert 0 <= json.loads(figures.read_text())["kl"]["held out.txt"] < 1e-3
    capsys.readouterr()
    assert cli.main(["inspect", str(coded)]) == 0
    said = capsys.readouterr().out
    (row,) = [line for line in said.splitlines() if line.startswith("pocketllm_codecs.trellis ")]
    assert row.split()[1:] == ["codec", "252", "trellis", "-", "276", *row.split()[-2:]]
    assert "| trellis | – | – | trellis codes |" in (coded / "README.md").read_text()


def test_codebooks_where_they_are_asked_for(coded_job: list[str], tmp_path: Path) -> None:
    """By name, or by a setting that trellis codes do not have."""
    (size, bits, *_, model) = coded_job
    for name, options in {
        "codebook": [size, bits, "--codec", "codebook"],
        "speed": [size, bits, "--codec", "auto", "--prefer", "speed"],
    }.items():
        assert cli.main(["compress", model, str(tmp_path / name), *options]) == 0
        checkpoint = open_checkpoint(tmp_path / name)
        assert {c.storage for c in checkpoint.layout.codecs.values()} == {"table-int8"}
        assert checkpoint.bits_per_weight <= float(bits)


def test_dry_run_with_trellis_codes(
    coded_job: list[str], coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "plan.json"
    options = ["--codec", "trellis", "--dry-run", "--json", str(figures)]
    assert cli.main(["compress", *coded_job, *options]) == 0
    said = capsys.readouterr().out.splitlines()
    (row,) = [line for line in said if line.startswith("trellis ")]
    assert row.split()[:6] == ["trellis", "-", "-", "trellis", "14", "84,480"]
    planned, made = json.loads(figures.read_text()), open_checkpoint(coded)
    assert planned["bits_per_weight"] == pytest.approx(made.bits_per_weight, rel=0.1)
    assert planned["bytes"] == pytest.approx(made.bytes, rel=0.1)
    assert set(planned["speeds"]) == {"trellis"} and planned["speeds"]["trellis"] > 0
    assert {tensor["codec"] for tensor in planned["tensors"]} == {"trellis"}


def test_same_trellis_codes_for_any_number_of_workers_and_by_default(
    coded_job: list[str], coded: Path, tmp_path: Path
) -> None:
    for workers, codec in (("1", []), ("2", ["--codec", "auto"])):
        out = tmp_path / workers
        assert cli.main(["compress", *coded_job, str(out), "--workers", workers, *codec]) == 0
        assert digest(out) == digest(coded)


def test_speed_takes_only_tables_for_registers(job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "fast"
    assert cli.main(["compress", *job, str(out), "--prefer", "speed"]) == 0
    codecs = open_checkpoint(out).layout.codecs.values()
    assert all(Shape(c.subvector, c.codebook) in FAST_LADDER for c in codecs)


def test_target_size_is_met(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    wanted = "85kB"
    arguments = ["--target-size", wanted, "--embeddings", "on"]
    assert cli.main(["compress", str(model), str(out), *arguments]) == 0
    assert 0.8 * cli.parse_size(wanted) < open_checkpoint(out).bytes <= cli.parse_size(wanted)


@dataclasses.dataclass
class Run:
    """Arguments but for the folder to make, and what they make."""

    job: list[str]
    made: Path


@pytest.fixture(params=["codebook", "trellis"])
def run(request: pytest.FixtureRequest) -> Run:
    """With each codec."""
    names = {"codebook": ("job", "undisturbed"), "trellis": ("coded_job", "coded")}
    return Run(*map(request.getfixturevalue, names[request.param]))


# Sensitivities, codecs, then matrices; with trellis codes none, and all but the last one.
@pytest.mark.parametrize(
    ("run", "parts"),
    [*(("codebook", n) for n in (0, 1, 2, 9, 21)), *(("trellis", n) for n in (2, 15))],
    indirect=["run"],
)
def test_resume_after_any_part(
    run: Run,
    tmp_path: Path,
    parts: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, out = run.job, tmp_path / "small"
    stored: list[str] = []
    store = Workspace.store

    def interrupted_store(self: Workspace, name: str, arrays: dict[str, np.ndarray]) -> None:
        if len(stored) == parts:
            raise KeyboardInterrupt
        store(self, name, arrays)
        stored.append(name)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "store", interrupted_store)
        assert cli.main(["compress", *job, str(out)]) == cli.INTERRUPTED
    assert len(list(partial(out).glob("*.safetensors"))) == parts
    capsys.readouterr()
    assert cli.main(["compress", *job, str(out)]) == 1
    assert "--resume" in sentence(capsys)
    assert cli.main(["compress", *job, str(out), "--resume", "--seed", "4"]) == 1
    assert "another seed" in sentence(capsys)
    assert not out.exists()
    assert cli.main(["compress", *job, str(out), "--resume"]) == 0
    assert digest(out) == digest(run.made)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_signal(
    job: list[str], undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "small"
    process = start(["compress", *job, str(out)])
    said = stop_after_parts(process, out, number)
    assert not out.exists() and "Traceback" not in said
    if number == signal.SIGINT:
        assert process.returncode == cli.INTERRUPTED
        assert said.splitlines()[-1].startswith("pocketllm: interrupted") and "--resume" in said
    assert cli.main(["compress", *job, str(out), "--resume"]) == 0
    assert digest(out) == digest(undisturbed)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("limit", [3_000, 60_000], ids=["a part", "the checkpoint"])
def test_file_size_limit_then_resume(
    job: list[str],
    undisturbed: Path,
    tmp_path: Path,
    limit: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert limit < (undisturbed / "model.safetensors").stat().st_size
    out = tmp_path / "small"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = cli.main(["compress", *job, str(out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert "cannot be written" in sentence(capsys)
    assert not out.exists()
    assert cli.main(["compress", *job, str(out), "--resume"]) == 0
    assert digest(out) == digest(undisturbed)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory at ``folder``; skips where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path, "size=48k"):
        assert cli.main(["compress", *job, str(tmp_path / "small")]) == 1
        assert not (tmp_path / "small").exists()
    assert "space" in sentence(capsys)


def test_read_only_place(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # Permissions do not bind root; a file system that is mounted read-only does.
    with mounted(closed, "ro") if os.geteuid() == 0 else nullcontext():
        assert cli.main(["compress", *job, str(closed / "small")]) == 1
    assert str(closed) in sentence(capsys)


def test_output_exists(job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    assert cli.main(["compress", *job, str(tmp_path)]) == 1
    assert "exists" in sentence(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def broken(model: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the model with something wrong."""
    shutil.copytree(model, folder)
    change(folder)
    return folder


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def put_nan(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[UP_PROJ].view(-1)[300].fill_(torch.nan))


def put_infinity(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[UP_PROJ].view(-1)[300].fill_(torch.inf))


def drop_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(UP_PROJ))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("codec", ["trellis", "codebook"])
def test_weights_near_the_end_of_float32(model: Path, tmp_path: Path, codec: str) -> None:
    """Their squares are far beyond it: what is shown are still the errors of what is stored."""
    folder = broken(
        model, tmp_path / "tiny", lambda m: edit_tensors(m, lambda t: t[UP_PROJ].mul_(1e38))
    )
    figures, out = tmp_path / "figures.json", tmp_path / "out"
    options = ["--codec", codec, "--json", str(figures)]
    assert cli.main(["compress", str(folder), str(out), *options]) == 0
    name = UP_PROJ.removesuffix(".weight")
    weight = load_file(folder / "model.safetensors")[UP_PROJ].double().numpy()
    assert 1e36 < np.abs(weight).max() < 1e38
    made = independent_reader.read(out)[0][name]
    error = np.square(made - weight).sum() / np.square(weight).sum()
    assert 0.001 < error < 0.1
    assert json.loads(figures.read_text())["errors"][name] == pytest.approx(error, rel=1e-4)


def put_largest(folder: Path) -> None:
    spread = torch.finfo(torch.bfloat16).max * torch.linspace(-1, 1, 64)
    edit_tensors(folder, lambda tensors: tensors[UP_PROJ].copy_(spread))


@pytest.mark.parametrize(
    "change, named",
    [
        (put_nan, UP_PROJ.removesuffix(".weight")),
        (put_infinity, UP_PROJ.removesuffix(".weight")),
        (put_largest, "up_proj: weight: with values up to 3.39e+38 some would come back as inf"),
        (drop_tensor, UP_PROJ),
        (truncate, "tiny"),
        (unknown_type, "abacus"),
        (no_json, "config.json"),
        (no_weights, "tiny"),
    ],
    ids=[
        "nan",
        "inf",
        "largest",
        "missing tensor",
        "truncated",
        "unknown type",
        "no json",
        "no weights",
    ],
)
def test_broken_models(
    model: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = broken(model, tmp_path / "tiny", change)
    capsys.readouterr()
    assert cli.main(["compress", str(folder), str(tmp_path / "out")]) == 1
    assert named in sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, named",
    [
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--bits", "0.2"], "bits"),
        (["--bits", "17"], "bits"),
        (["--target-size", "5kB"], "target_size"),
        (["--subvector", "17", "--codebook", "16"], "subvector"),
        (["--subvector", "4", "--codebook", "65537"], "codebook"),
        (["--subvector", "16", "--codebook", "65536"], "codebook"),
        (["--codec", "trellis", "--preset", "paper-8x"], "does not go with subvector = 4"),
        (["--codec", "trellis", "--subvector", "4", "--codebook", "256"], "with subvector = 4"),
        (["--codec", "trellis", "--prefer", "speed"], "does not go with prefer = 'speed'"),
        (["--codec", "trellis", "--bits", "0.3"], "bits per weight cannot be met"),
        (["--json", "nowhere/figures.json"], "--json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_requests_that_cannot_be_met(
    model: Path,
    tmp_path: Path,
    options: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["compress", str(model), str(tmp_path / "out"), *options]) == 1
    assert named in sentence(capsys)
    assert not list(tmp_path.iterdir())


def test_config_with_an_unknown_setting(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"bitz": 3}')
    arguments = ["--config", str(tmp_path / "config.json"), "--dry-run"]
    assert cli.main(["compress", str(model), *arguments]) == 1
    assert "bitz" in sentence(capsys)


def flip_payload(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def raise_version(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, named",
    [(flip_payload, "checksum"), (raise_version, "99"), (truncate, "model.safetensors")],
    ids=["flipped bit", "version", "truncated"],
)
@pytest.mark.parametrize("command", ["verify", "decompress", "generate", "eval"])
def test_damaged_checkpoints(
    undisturbed: Path,
    tmp_path: Path,
    command: str,
    change: Callable[[Path], None],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = broken(undisturbed, tmp_path / "small", change)
    more = {
        "decompress": [str(tmp_path / "out")],
        "generate": ["--prompt", "The"],
        "eval": ["--text", __file__],
    }.get(command, [])
    capsys.readouterr()
    assert cli.main([command, str(folder), *more]) == 1
    assert named in sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_a_dense_folder_is_no_checkpoint(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify"):
        assert cli.main([command, str(model)]) == 1
        assert "quantization_config" in sentence(capsys)


def test_compressing_twice_is_refused(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compress", str(undisturbed), str(tmp_path / "out")]) == 1
    assert "already quantised" in sentence(capsys)
