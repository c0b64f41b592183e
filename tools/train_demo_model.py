"""Train the model that ships in ``pocketllm/demo_data`` from text inside CPython.

The text is ``pydoc_data.topics`` plus the docstrings and longer comments of the standard library,
read with ``ast`` and ``tokenize`` (no module is imported or executed). Documents, one a topic or a
module, are de-duplicated by paragraph, ordered by name and split with a seed into training text
and held-out text, so that no held-out document was seen in training.

    python tools/train_demo_model.py --out pocketllm/demo_data

It takes about half an hour of one core with AVX2 (912 steps of 1.7 s). The exact text depends on
the Python version that runs it; ``training.json`` records the version, hashes and figures.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import math
import platform
import random
import sysconfig
import time
import tokenize
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20260
VOCABULARY = 2048
CONTEXT = 512
HELDOUT_BYTES = 80_000
CALIBRATION_BYTES = 120_000
MIN_PARAGRAPH_CHARS = 40
MIN_COMMENT_CHARS = 120
# Generated tables, vendored trees and tests: little prose, or many near-copies of one another.
SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "encodings", "lib2to3", "ensurepip",
    "pydoc_data", "msilib", "test", "tests", "idle_test",
}  # fmt: skip


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """One line in the manner of ``help()``: ``name(arguments)`` or ``class Name(Base)``."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def docstrings(tree: ast.Module) -> list[tuple[int, str]]:
    """(line, text) of every docstring, the signature above it."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        if isinstance(node, ast.Module):
            found.append((0, text))
        else:
            found.append((node.lineno, f"{signature(node)}\n\n{text}"))
    return found


def comments(source: str) -> list[tuple[int, str]]:
    """(line, text) of every run of comment-only lines that is long enough and reads as prose."""
    lines: dict[int, str] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
                lines[token.start[0]] = token.string.lstrip("#").strip()
    except (tokenize.TokenError, IndentationError):
        return []
    found: list[tuple[int, str]] = []
    run: list[str] = []
    for number in sorted(lines):
        run.append(lines[number])
        if number + 1 in lines:
            continue
        text = "\n".join(run).strip()
        prose = sum(c.isalpha() or c.isspace() for c in text)
        if len(text) >= MIN_COMMENT_CHARS and prose > 0.85 * len(text):
            found.append((number - len(run) + 1, text))
        run = []
    return found


def collect_documents() -> dict[str, str]:
    """Name -> text of every document, in order of name, repeated paragraphs dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    raw: dict[str, str] = {}
    topics = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(topics):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                    raw[f"topic/{key.value}"] = str(value.value)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        pieces = sorted(docstrings(tree) + comments(source))
        if pieces:
            name = ".".join(relative.with_suffix("").parts)
            raw[f"module/{relative.as_posix()}"] = "\n\n".join(
                [f"Help on module {name}:"] + [text for _, text in pieces]
            )
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(raw):
        kept: list[str] = []
        for paragraph in raw[name].expandtabs().split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= MIN_PARAGRAPH_CHARS:
                if key in seen:
                    continue
                seen.add(key)
            if key:
                kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
        text = "\n\n".join(kept).strip()
        if len(text) >= 200 and sum(not c.isascii() for c in text) <= 0.01 * len(text):
            documents[name] = text + "\n"
    return documents


def split_documents(documents: dict[str, str]) -> tuple[list[str], list[str]]:
    """(training, held-out) texts. Held out: whole documents drawn with the seed, half by size
    from topics and half from modules, none larger than a tenth of the held-out text."""
    order = sorted(documents)
    random.Random(SEED).shuffle(order)
    heldout: list[str] = []
    for kind in ("topic/", "module/"):
        size = 0
        for name in order:
            length = len(documents[name])
            fits = 1500 < length < HELDOUT_BYTES // 10 and size + length <= HELDOUT_BYTES // 2
            if name.startswith(kind) and fits:
                heldout.append(name)
                size += length
    held = set(heldout)
    return [documents[n] for n in sorted(documents) if n not in held], [
        documents[n] for n in sorted(held)
    ]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, every byte representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def build_model(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.02,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is replaced by its nearest semi-orthogonal matrix (Jordan et al. 2024),
    by five Newton-Schulz steps in float32: ``torch.optim.Muon`` does them in bfloat16, some 25
    times slower on a processor without bfloat16 instructions."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(moment, group["momentum"])
                wide = update.shape[0] <= update.shape[1]
                x = update if wide else update.T
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # 0.2 sqrt(larger side): the update's RMS then matches AdamW's usual one.
                p.add_(x if wide else x.T, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def optimisers(
    model: LlamaForCausalLM, lr: float, muon_lr: float, decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, AdamW for embedding and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, muon_lr, decay),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def epoch_stream(tokens: list[np.ndarray], epoch: int) -> np.ndarray:
    """All documents in a seeded order, each followed by the end token, from a random offset."""
    rng = np.random.default_rng(SEED + epoch)
    order = rng.permutation(len(tokens))
    stream = np.concatenate([part for i in order for part in (tokens[i], np.array([1]))])
    return np.roll(stream, -int(rng.integers(len(stream))))


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: np.ndarray) -> float:
    """Non-overlapping windows of CONTEXT, mean over predicted tokens."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, CONTEXT):
        window = torch.as_tensor(ids[start : start + CONTEXT], dtype=torch.long)[None]
        if window.shape[1] < 2:
            continue
        logits = model(input_ids=window).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        count += window.shape[1] - 1
    return math.exp(total / count)


def unigram_perplexity(training: np.ndarray, ids: np.ndarray) -> float:
    """Of add-one-smoothed token frequencies: the yardstick a language model must beat."""
    counts = np.bincount(training, minlength=VOCABULARY) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[ids].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model; see the module docstring.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens a step")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=8e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=0, help="stop early, to try settings")
    parser.add_argument("--text-only", action="store_true", help="write the text and stop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    training, heldout = split_documents(collect_documents())
    args.out.mkdir(parents=True, exist_ok=True)
    heldout_text = "\n".join(heldout)
    order = list(range(len(training)))
    random.Random(SEED + 1).shuffle(order)
    calibration_text = "\n".join(training[i] for i in order)[:CALIBRATION_BYTES]
    calibration_text = calibration_text[: calibration_text.rindex("\n") + 1]
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    (args.out / "calibration.txt").write_text(calibration_text, encoding="utf-8")
    tokenizer = train_tokenizer(training)
    tokens = [np.array(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in training]
    held_ids = np.array(tokenizer(heldout_text, add_special_tokens=False)["input_ids"])
    flat = np.concatenate(tokens)
    print(
        f"training: {len(training)} documents, {sum(map(len, training))} bytes, {len(flat)} tokens;"
        f" held out: {len(heldout)} documents, {len(heldout_text)} bytes, {len(held_ids)} tokens",
        flush=True,
    )
    if args.text_only:
        return

    model = build_model(args.layers, args.hidden, args.ffn, args.heads, args.kv_heads)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    parts = optimisers(model, args.lr, args.muon_lr, args.weight_decay)
    base_lrs = [[group["lr"] for group in part.param_groups] for part in parts]
    step_tokens = args.batch * CONTEXT
    steps_per_epoch = (len(flat) + len(tokens)) // step_tokens
    total_steps = steps_per_epoch * args.epochs
    warmup = max(1, total_steps // 50)
    started, step, loss_sum, loss_count = time.perf_counter(), 0, 0.0, 0
    losses: list[float] = []
    for epoch in range(args.epochs):
        stream = epoch_stream(tokens, epoch)
        # Short windows first: attention costs half, and most of what is learnt early is local.
        width = CONTEXT if epoch >= args.epochs - max(1, args.epochs // 3) else CONTEXT // 2
        windows = stream[: steps_per_epoch * step_tokens].reshape(steps_per_epoch, -1, width)
        for index in np.random.default_rng(SEED - epoch).permutation(len(windows)):
            if args.max_steps and step >= args.max_steps:
                break
            progress = (step - warmup) / max(1, total_steps - warmup)
            factor = (
                (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
            )
            for part, lrs in zip(parts, base_lrs, strict=True):
                for group, lr in zip(part.param_groups, lrs, strict=True):
                    group["lr"] = lr * factor
            batch = torch.as_tensor(windows[index], dtype=torch.long)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in parts:
                part.step()
                part.zero_grad(set_to_none=True)
            loss_sum, loss_count, step = loss_sum + loss.item(), loss_count + 1, step + 1
            if step % 50 == 0 or step in (5, 25):
                spent = time.perf_counter() - started
                print(
                    f"epoch {epoch + 1} step {step}/{total_steps} loss {loss_sum / loss_count:.4f}"
                    f" {spent:.0f} s, {spent / step * (total_steps - step):.0f} s left",
                    flush=True,
                )
                losses.append(round(loss_sum / loss_count, 4))
                loss_sum, loss_count = 0.0, 0
        model.eval()
        print(
            f"epoch {epoch + 1}: held-out perplexity {perplexity(model, held_ids):.3f}", flush=True
        )
        model.train()

    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "text_only")},
        "seed": SEED,
        "training_documents": len(training),
        "training_tokens": len(flat),
        "training_sha256": hashlib.sha256("\n".join(training).encode()).hexdigest(),
        "heldout_sha256": hashlib.sha256(heldout_text.encode()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "heldout_tokens": len(held_ids),
        "heldout_perplexity": round(perplexity(model.float(), held_ids), 4),
        "heldout_unigram_perplexity": round(unigram_perplexity(flat, held_ids), 2),
        "loss_every_50_steps": losses,
        "seconds": round(time.perf_counter() - started),
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
