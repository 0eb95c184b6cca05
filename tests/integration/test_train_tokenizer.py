"""``scripts/train_tokenizer.py``: a tokenizer and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Shown
from transformers import PreTrainedTokenizerFast

from accel_train.tasks.text.builtin import builtin_text

SCRIPT = ROOT / "scripts" / "train_tokenizer.py"


def trained(*arguments: object) -> Shown:
    line = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    return Shown(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(("kind", "size"), [("bpe", 500), ("unigram", 400), ("char", 99)])
def test_it_writes_a_file_that_transformers_loads(tmp_path: Path, kind: str, size: int) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(builtin_text(60_000, 0)))
    options = ["--corpus-path", corpus, "--model-type", kind, "--output-dir", tmp_path / "out" / "new"]
    shown = trained(*options, *([] if kind == "char" else ["--vocab-size", size]))
    assert shown.code == 0, shown.err
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "out" / "new" / "tokenizer.json"))
    assert len(fast) == size
    ids = fast("near the garden", add_special_tokens=False)["input_ids"]
    assert fast.decode(ids).replace(" ", "") == "nearthegarden"


@pytest.mark.parametrize(
    ("content", "options", "code", "says"),
    [
        (b"", [], 2, "is empty"),
        (b"text\x00", [], 2, "is binary: byte 0x00 at offset 4"),
        (None, [], 2, "does not exist"),
        (b"a few words\n", ["--vocab-size", "5000"], 2, "a vocabulary of 5000 was asked for"),
        (b"a few words\n", ["--vocab-size", "10"], 2, "10 must be more than 260"),
        (b"a few words\n", ["--model-type", "char", "--output-dir", "/dev/null/x"], 1, "choose another --output-dir"),
    ],
)
def test_what_cannot_be_used_is_said(
    tmp_path: Path, content: bytes | None, options: list[str], code: int, says: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    shown = trained("--corpus-path", corpus, "--output-dir", tmp_path / "out", *options)
    assert shown.code == code, shown.err
    assert says in shown.err
    assert "Traceback" not in shown.err
