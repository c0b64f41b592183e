"""The command line: arguments first, so that every ``--help`` is instant; work in ``commands``."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from . import __version__
from .config import CODECS, PREFERENCES, PRESETS
from .errors import PocketError

DEBUG_VARIABLE = "POCKETLLM_DEBUG"
FAILURE = 1
INTERRUPTED = 130
UNITS = {
    "": 1,
    **{f"{p}b": 1000**i for i, p in enumerate(("", "k", "m", "g", "t"))},
    **{f"{p}ib": 1024**i for i, p in enumerate(("k", "m", "g", "t"), start=1)},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, 1 for a failure, 130 after Ctrl-C.

    A usage error leaves through ``SystemExit(2)``, as argparse does. A failure prints one sentence
    on standard error; ``POCKETLLM_DEBUG=1`` lets the traceback through instead.
    """
    arguments = build_parser().parse_args(argv)
    _check_usage(arguments)
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    try:
        command = getattr(import_module(".commands", __package__), f"run_{arguments.command}")
        command(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        if debug:
            raise
        return _say(_interrupted(arguments), INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe such as `| head` has gone: nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _say(describe(error), FAILURE)


def describe(error: BaseException) -> str:
    """One sentence for a person about what went wrong."""
    if isinstance(error, PocketError):
        return one_line(str(error))
    if isinstance(error, MemoryError):
        return "out of memory: close other programs or take a machine with more of it"
    if isinstance(error, OSError) and error.strerror:
        where = f" {os.fspath(error.filename)!r}" if error.filename is not None else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"no space left to write{where}: make room, then run again with --resume"
        return f"{error.strerror}:{where}" if where else error.strerror
    text = one_line(str(error))
    return f"{type(error).__name__}: {text} ({DEBUG_VARIABLE}=1 shows the traceback)"


def one_line(text: str) -> str:
    """``text`` without line breaks."""
    return " ".join(text.split())


def parse_size(text: str) -> int:
    """Bytes named by ``"300MB"``, ``"1.5 GB"``, ``"300MiB"`` or a plain number.

    Decimal prefixes are powers of 1000, binary ones (KiB, MiB, GiB, TiB) powers of 1024.

    Raises:
        argparse.ArgumentTypeError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match.group(2).lower()) if match else None
    size = int(float(match.group(1)) * unit) if match and unit else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, want a size such as 300MB, 1.5GB or 300MiB"
        )
    return size


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Importing nothing heavy is the point of this module."""
    parser = argparse.ArgumentParser(
        prog="pocketllm",
        description="Compress Hugging Face language models and run them from the packed form.",
        epilog="`pocketllm COMMAND --help` tells more about a command.",
        formatter_class=_formatter,
    )
    parser.add_argument("--version", action="version", version=f"pocketllm {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )
    _add_demo(commands)
    _add_compress(commands)
    _add_inspect(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_decompress(commands)
    _add_verify(commands)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28)


def _add(commands: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=_formatter,
    )
    parser.set_defaults(usage_error=parser.error)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE as JSON")


def _add_demo(commands: Any) -> None:
    parser = _add(
        commands,
        "demo",
        "compress, load, evaluate and run a small embedded model, without a network",
        "pocketllm demo --out pocketllm-demo",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="pocketllm-demo",
        help="folder for the results (default: %(default)s)",
    )
    _add_json(parser)


def _add_compress(commands: Any) -> None:
    parser = _add(
        commands,
        "compress",
        "compress a causal language model",
        "pocketllm compress Qwen/Qwen2.5-0.5B small --bits 3 --calibration text.txt",
    )
    parser.add_argument("model", metavar="MODEL", help="hub name or folder of a dense model")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to make")
    size = parser.add_argument_group("size", "one of these; 3 bits per weight without any")
    size.add_argument(
        "--bits", type=_positive_number, metavar="B", help="bits per weight, everything included"
    )
    size.add_argument(
        "--target-size", type=parse_size, metavar="SIZE", help="all weight files, such as 300MB"
    )
    size.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="NAME",
        help=f"published settings: {', '.join(PRESETS)}",
    )
    size.add_argument("--subvector", type=_positive, metavar="D", help="values per sub-vector")
    size.add_argument("--codebook", type=_positive, metavar="K", help="number of codewords")
    parser.add_argument(
        "--codec",
        choices=list(CODECS),
        help="what a size is met with: trellis codes (and codebooks for matrices that need fewer"
        " than 1 or more than 6 bits), or codebooks (default: trellis codes unless another setting"
        " asks for codebooks)",
    )
    parser.add_argument(
        "--prefer",
        choices=list(PREFERENCES),
        help="speed: at the same size a faster, less exact model (default: quality)",
    )
    parser.add_argument(
        "--method", choices=["pocket"], default="pocket", help="the codec (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="text whose activations weight the error"
    )
    parser.add_argument(
        "--embeddings", choices=["on", "off"], help="compress embeddings and head (default: off)"
    )
    parser.add_argument("--config", metavar="FILE", help="JSON file of settings; options win")
    parser.add_argument("--seed", type=_count, metavar="N", help="seeds every random choice")
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="threads (default: all; same bytes for any)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run of OUT stopped"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only predict time, memory, size, speed; needs no OUT",
    )
    _add_json(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        "list what a compressed model holds: codec, bits and bytes of every tensor",
        "pocketllm inspect small",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a compressed model")
    _add_json(parser)


def _add_eval(commands: Any) -> None:
    parser = _add(
        commands,
        "eval",
        "measure perplexity, divergence from the dense model, and lm-eval tasks",
        "pocketllm eval small --text heldout.txt --against Qwen/Qwen2.5-0.5B",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a model, compressed or dense")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="perplexity on these text files"
    )
    parser.add_argument(
        "--tasks", type=_names, default=[], metavar="T,...", help="lm-eval tasks, comma-separated"
    )
    parser.add_argument(
        "--include-path", metavar="D", help="folder of further lm-eval task definitions"
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="first N examples of a task")
    parser.add_argument(
        "--against", metavar="DENSE", help="dense model to compare with: its perplexity, and KL"
    )
    _add_json(parser)


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        "continue a prompt, printing the text as it is made",
        'pocketllm generate small --prompt "The weather today"',
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a model, compressed or dense")
    parser.add_argument("--prompt", required=True, metavar="P", help="text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        default=64,
        metavar="N",
        help="tokens to add at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=_positive_number,
        metavar="T",
        help="sample at this temperature (default: always the likeliest token)",
    )
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="seed of the sampling (default: 0)"
    )


def _add_decompress(commands: Any) -> None:
    parser = _add(
        commands,
        "decompress",
        "write a compressed model as a dense Hugging Face checkpoint for any other tool",
        "pocketllm decompress small dense",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a compressed model")
    parser.add_argument("out", metavar="OUT", help="folder to make")


def _add_verify(commands: Any) -> None:
    parser = _add(
        commands,
        "verify",
        "check a compressed model: checksums, shapes and index ranges",
        "pocketllm verify small",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a compressed model")


def _check_usage(arguments: argparse.Namespace) -> None:
    """What argparse cannot say: options that need or exclude each other. Leaves with status 2."""
    if arguments.command == "compress":
        _check_compress(arguments)
    elif arguments.command == "eval" and not (arguments.text or arguments.tasks):
        arguments.usage_error("nothing to measure: give --text FILE or --tasks T,...")


def _check_compress(arguments: argparse.Namespace) -> None:
    if (arguments.subvector is None) != (arguments.codebook is None):
        arguments.usage_error("--subvector and --codebook: give both or neither")
    given = [
        name
        for name in ("bits", "target_size", "preset", "codebook")
        if getattr(arguments, name) is not None
    ]
    if len(given) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        arguments.usage_error(f"{options}: these exclude each other, give one")
    if arguments.out is None and not arguments.dry_run:
        arguments.usage_error("OUT: name the folder to make (only --dry-run goes without)")


def _positive(text: str) -> int:
    return _integer(text, 1)


def _count(text: str) -> int:
    return _integer(text, 0)


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"got {text!r}, want an integer of at least {low}")
    return value


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a positive number")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"got {text!r}, want names separated by commas")
    return names


def _interrupted(arguments: argparse.Namespace) -> str:
    if arguments.command == "compress" and not arguments.dry_run:
        return "interrupted: the same command with --resume goes on from the last finished tensor"
    return "interrupted"


def _say(sentence: str, status: int) -> int:
    print(f"pocketllm: {sentence}", file=sys.stderr)
    return status
