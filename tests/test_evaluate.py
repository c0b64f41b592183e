"""Perplexity and divergence against a naive float64 loop; lm-eval against its own dense model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model, write_tiny

from pocketllm import evaluate
from pocketllm.errors import PocketError

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


class LetterTokenizer:
    """One token a character; special tokens only on request."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        ids = [LETTERS.index(letter) for letter in text]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}

    def __len__(self) -> int:
        return 50


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Two random models of one shape, with logits far from uniform."""
    pair = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    for model in pair:
        model.lm_head.weight.data.mul_(20)
    return pair


@pytest.fixture(scope="module")
def text() -> str:
    rng = np.random.default_rng(0)
    return "".join(rng.choice(list(LETTERS), size=151))


def log_softmax64(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """(tokens, vocabulary) log-probabilities in float64 of one window run alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def naive(
    dense: torch.nn.Module, model: torch.nn.Module, ids: list[int], starts: list[int], window: int
) -> tuple[float, float, float]:
    """(perplexity of model, KL(dense || model), top-1 agreement), one token at a time."""
    nll, kl, same, predicted, positions = 0.0, 0.0, 0, 0, 0
    for start in starts:
        part = ids[start : start + window]
        p, q = log_softmax64(dense, part), log_softmax64(model, part)
        for i in range(len(part)):
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p[i], q[i], strict=True))
            same += int(p[i].argmax() == q[i].argmax())
            positions += 1
            if i + 1 < len(part):
                nll -= q[i][part[i + 1]]
                predicted += 1
    return math.exp(nll / predicted), kl / positions, same / positions


def test_perplexity_is_the_naive_one_at_any_batch_size(models: Any, text: str) -> None:
    _, model = models
    ids = [LETTERS.index(letter) for letter in text]
    want, _, _ = naive(model, model, ids, list(range(0, 144, 16)), 16)
    for batch_size in (None, 1, 4, 100):
        found = evaluate.perplexity(
            model, LetterTokenizer(), text, window=16, batch_size=batch_size, progress=False
        )
        assert found == pytest.approx(want, rel=1e-5)


def test_compare_is_the_naive_loop(models: Any, text: str, monkeypatch: Any) -> None:
    dense, model = models
    # Chunks of 7 positions, so that window ends and chunk ends do not coincide.
    monkeypatch.setattr(evaluate, "CHUNK_BYTES", 7 * 4 * 50)
    ids = [LETTERS.index(letter) for letter in text]
    perplexity, kl, top1 = naive(dense, model, ids, list(range(0, 144, 16)), 16)
    dense_perplexity, _, _ = naive(dense, dense, ids, list(range(0, 144, 16)), 16)
    found = evaluate.compare(dense, model, LetterTokenizer(), text, window=16, progress=False)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found["perplexity_dense"] == pytest.approx(dense_perplexity, rel=1e-5)
    assert kl > 0.1
    assert found["kl"] == pytest.approx(kl, rel=1e-5)
    assert 0 < top1 < 1
    assert found["top1"] == pytest.approx(top1)


def test_a_model_does_not_diverge_from_itself(models: Any, text: str) -> None:
    dense, _ = models
    found = evaluate.compare(dense, dense, LetterTokenizer(), text, window=16, progress=False)
    assert abs(found["kl"]) < 1e-7
    assert found["top1"] == 1


def test_windows_spread_from_the_first_to_the_last(models: Any, text: str) -> None:
    windows = evaluate.token_windows(LetterTokenizer(), text, window=10, max_windows=4)
    ids = [LETTERS.index(letter) for letter in text]
    want = [ids[start : start + 10] for start in (0, 40, 90, 140)]
    assert windows.tolist() == want


def test_a_short_text_is_one_window(models: Any) -> None:
    assert evaluate.token_windows(LetterTokenizer(), "abc").tolist() == [[0, 1, 2]]


def test_a_path_is_read_and_a_string_is_text(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_text("cab", encoding="utf-8")
    assert evaluate.token_windows(LetterTokenizer(), path).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"a", {}, "has 1 tokens"),
        (b"\xff\xfe", {}, "not UTF-8"),
        (b"abc", {"window": 1}, "window: got 1"),
        (b"abc", {"max_windows": 0}, "max_windows: got 0"),
    ],
)
def test_bad_texts_and_settings(
    tmp_path: Path, content: bytes, settings: dict[str, int], message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(PocketError, match=message):
        evaluate.token_windows(LetterTokenizer(), path, **settings)


def test_another_vocabulary_is_refused(models: Any, text: str) -> None:
    dense, model = models
    other = tiny_model("llama", seed=3)
    other.resize_token_embeddings(60)
    with pytest.raises(PocketError, match="vocabulary has 60 tokens"):
        evaluate.compare(other, model, LetterTokenizer(), text, window=16, progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense and a compressed tiny model with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    base = tmp_path_factory.mktemp("evaluate")
    alphabet = sorted(LETTERS)
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    model = tiny_model("llama")
    model.save_pretrained(base / "dense")
    write_tiny(base / "small", tiny_model("llama"))
    for name in ("dense", "small"):
        tokenizer.save_pretrained(base / name)
    return base / "dense", base / "small"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of two BLiMP paradigms."""
    folder = tmp_path_factory.mktemp("blimp")
    rng = np.random.default_rng(0)
    for name in ("wh_island", "causative"):
        lines = [
            json.dumps(
                {
                    "sentence_good": "".join(rng.choice(list(LETTERS[:26]), size=8)) + ".",
                    "sentence_bad": "".join(rng.choice(list(LETTERS[:26]), size=8)) + ".",
                    "UID": name,
                }
            )
            for _ in range(12)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_evaluate_reports_by_file_name(
    folders: tuple[Path, Path], tmp_path: Path, text: str
) -> None:
    dense, small = folders
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text(text[:70], encoding="utf-8")
    found = evaluate.evaluate(
        small, [tmp_path / "a.txt", str(tmp_path / "b.txt")], against=dense, progress=False
    )
    assert found["perplexity"].keys() == found["kl"].keys() == {"a.txt", "b.txt"}
    assert found["tasks"] == {}
    assert found["kl"]["a.txt"] > 0
    size = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert found["bytes"] == size
    weights = sum(p.numel() for p in tiny_model("llama").parameters())
    assert found["bytes_bf16"] == 2 * weights
    assert 0 < found["bits_per_weight"] < 16
    alone = evaluate.evaluate(small, [tmp_path / "a.txt"], progress=False)
    assert alone["perplexity"]["a.txt"] == pytest.approx(found["perplexity"]["a.txt"], rel=1e-6)
    assert alone.keys() == {"perplexity", "kl", "tasks", "bits_per_weight", "bytes", "bytes_bf16"}
    json.dumps(found)


def test_a_dense_folder_can_be_measured(folders: tuple[Path, Path], text: str) -> None:
    dense, _ = folders
    found = evaluate.sizes(dense)
    assert 32 < found["bits_per_weight"] < 40
    assert found["bytes"] == (dense / "model.safetensors").stat().st_size


def test_missing_text_is_named_before_loading(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(PocketError, match="no file .*nowhere.txt"):
        evaluate.evaluate(folders[1], [tmp_path / "nowhere.txt"])


def naive_accuracy(model: torch.nn.Module, tokenizer: Any, path: Path) -> float:
    """Share of pairs whose good sentence is likelier, each sentence scored alone after ``<s>``."""
    right = 0
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        record = json.loads(line)
        scores = []
        for key in ("sentence_good", "sentence_bad"):
            ids = [0, *tokenizer(" " + record[key], add_special_tokens=False)["input_ids"]]
            log_p = log_softmax64(model, ids)
            scores.append(sum(log_p[i, ids[i + 1]] for i in range(len(ids) - 1)))
        right += int(scores[0] > scores[1])
    return right / len(lines)


def test_blimp_from_a_local_folder(folders: tuple[Path, Path], pairs: Path) -> None:
    pytest.importorskip("lm_eval")
    small = folders[1]
    found = evaluate.evaluate(
        small, tasks=["wh_island", "blimp_causative"], include_path=pairs, progress=False
    )
    model, tokenizer = evaluate.load(small), evaluate.load_tokenizer(small)
    assert found["tasks"] == {
        f"blimp_{name}": {"acc": naive_accuracy(model, tokenizer, pairs / f"{name}.jsonl")}
        for name in ("wh_island", "causative")
    }


def test_a_limit_and_a_missing_paradigm(folders: tuple[Path, Path], pairs: Path) -> None:
    pytest.importorskip("lm_eval")
    from pocketllm.lm_eval_plugin import run_tasks

    model, tokenizer = evaluate.load(folders[0]), evaluate.load_tokenizer(folders[0])
    found = run_tasks(model, tokenizer, ["wh_island"], include_path=pairs, limit=1, progress=False)
    assert found["blimp_wh_island"]["acc"] in (0.0, 1.0)
    with pytest.raises(PocketError, match=r"no file .*adjunct_island\.jsonl"):
        run_tasks(model, tokenizer, ["adjunct_island"], include_path=pairs, progress=False)


def test_unknown_tasks_and_folders(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from pocketllm.lm_eval_plugin import check_tasks

    assert check_tasks(["blimp", "causative"], pairs) == ["blimp", "blimp_causative"]
    with pytest.raises(PocketError, match="no folder"):
        check_tasks(["blimp"], tmp_path / "nowhere")
    with pytest.raises(PocketError, match="has a task 'no_such_task'"):
        check_tasks(["no_such_task"], pairs)


def test_tasks_without_lm_eval(folders: tuple[Path, Path], monkeypatch: Any) -> None:
    for name in [name for name in sys.modules if name.startswith("pocketllm.lm_eval_plugin")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(PocketError, match="lm-eval is not installed"):
        evaluate.evaluate(folders[1], tasks=["blimp"])


def test_the_group_lists_every_paradigm_once() -> None:
    yaml = pytest.importorskip("yaml")
    from pocketllm import evaluate as module

    folder = Path(module.__file__).parent / "tasks" / "blimp"
    group = yaml.safe_load((folder / "_blimp.yaml").read_text(encoding="utf-8"))
    paradigms = []
    for path in sorted(folder.glob("[a-zA-Z]*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert task["task"] == f"blimp_{task['dataset_kwargs']['paradigm']}"
        assert task["dataset_kwargs"]["paradigm"] == path.stem
        paradigms.append(task["task"])
    assert len(paradigms) == 67
    assert sorted(group["task"]) == sorted(paradigms)


def test_lm_eval_finds_the_model_type_by_name(folders: tuple[Path, Path]) -> None:
    pytest.importorskip("lm_eval")
    # In a fresh interpreter: lm-eval first, and its own models must stay known.
    script = (
        "import pocketllm._autoload as a; a.install()\n"
        "from lm_eval.api.registry import get_model\n"
        "assert get_model('hf').__name__ == 'HFLM'\n"
        f"lm = get_model('pocketllm')(pretrained={str(folders[1])!r}, batch_size=2)\n"
        "print(type(lm.model.lm_head).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "PocketLinear"
