"""The command line from outside: help, usage errors, one sentence for each failure."""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pocketllm
from pocketllm import cli

COMMANDS = ("demo", "compress", "inspect", "eval", "generate", "decompress", "verify")
HELP_SECONDS = 0.3
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pocketllm", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "POCKETLLM_DEBUG": "0", **environment},
    )


def fails(*arguments: object, **environment: str) -> str:
    """The one sentence of a command that must fail with status 1."""
    result = run(*arguments, **environment)
    lines = [line for line in result.stderr.splitlines() if line.startswith("pocketllm: ")]
    assert result.returncode == 1, result.stderr + result.stdout
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.rstrip().endswith(lines[0]), "the sentence must come last"
    return lines[0].removeprefix("pocketllm: ")


def without_coverage() -> dict[str, str]:
    """An environment in which a child process is not traced, so that it can be timed."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COV")}


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_is_instant(command: list[str]) -> None:
    seconds = []
    for _ in range(5):
        # Processor time: what the clock on the wall says depends on what else the machine does.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(
            [sys.executable, "-m", "pocketllm", *command, "--help"],
            capture_output=True,
            text=True,
            env=without_coverage(),
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert result.returncode == 0 and result.stdout.startswith("usage: pocketllm")
        if seconds[-1] < HELP_SECONDS:
            return
    pytest.fail(f"--help took {min(seconds):.2f} s at best, want {HELP_SECONDS}")


def test_help_names_every_command() -> None:
    listed = cli.build_parser().format_help()
    assert tuple(re.findall(r"^    (\w+)(?:  |$)", listed, re.MULTILINE)) == COMMANDS


def test_version() -> None:
    assert run("--version").stdout == f"pocketllm {pocketllm.__version__}\n"


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((), "COMMAND"),
        (("squash",), "squash"),
        (("compress",), "MODEL"),
        (("compress", "model"), "OUT"),
        (("compress", "model", "out", "--bits", "three"), "--bits"),
        (("compress", "model", "out", "--bits", "-1"), "--bits"),
        (("compress", "model", "out", "--bits", "nan"), "--bits"),
        (("compress", "model", "out", "--target-size", "12 parsecs"), "--target-size"),
        (("compress", "model", "out", "--preset", "paper-2x"), "paper-2x"),
        (("compress", "model", "out", "--bits", "3", "--preset", "paper-8x"), "exclude"),
        (("compress", "model", "out", "--bits", "3", "--target-size", "3MB"), "exclude"),
        (("compress", "model", "out", "--subvector", "4"), "both or neither"),
        (("compress", "model", "out", "--codebook", "256"), "both or neither"),
        (("compress", "model", "out", "--method", "magic"), "magic"),
        (("compress", "model", "out", "--codec", "zip"), "zip"),
        (("compress", "model", "out", "--embeddings", "some"), "some"),
        (("compress", "model", "out", "--workers", "0"), "--workers"),
        (("compress", "model", "out", "--seed", "-3"), "--seed"),
        (("eval", "model"), "--text"),
        (("eval", "model", "--tasks", ","), "--tasks"),
        (("generate", "model"), "--prompt"),
        (("generate", "model", "--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("decompress", "model"), "OUT"),
    ],
)
def test_usage_errors_exit_2(
    arguments: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: pocketllm") and named in message.splitlines()[-1]


@pytest.mark.parametrize(
    "text, size",
    [
        ("300MB", 300_000_000),
        ("300 mb", 300_000_000),
        ("1.5GB", 1_500_000_000),
        ("300MiB", 300 * 2**20),
        (".5KiB", 512),
        ("4096", 4096),
        ("12b", 12),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "0.1B", "-3MB", "3 XB", "1e6", "1.2.3", "i"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="300MB"):
        cli.parse_size(text)


def documented_commands() -> list[list[str]]:
    """The `pocketllm` lines of every shell block in the README and in docs/."""
    blocks = [
        block
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("pocketllm ")]


def test_documented_commands_parse() -> None:
    documented = documented_commands()
    assert {command[0] for command in documented} >= set(COMMANDS) - {"demo"}
    for command in documented:
        assert cli.build_parser().parse_args(command).command == command[0]


def test_missing_model(tmp_path: Path) -> None:
    assert "no such folder" in fails("compress", tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compress", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "config.json" in capsys.readouterr().err
