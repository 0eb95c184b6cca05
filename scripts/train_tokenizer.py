#!/usr/bin/env python3
"""Train a tokenizer on a text corpus and save it as ``tokenizer.json``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from accel_train.files.atomic import write_atomic
from accel_train.process.console import Meter
from accel_train.tasks.text.corpus import Corpus, UnusableCorpus, check_corpus, find_files
from accel_train.tasks.text.tokenizer import SMALLEST_VOCAB, TOKENIZER_FILE, VocabularyError, train_tokenizer


def _counted(corpus: Corpus, meter: Meter) -> Iterator[str]:
    for piece in corpus.pieces():
        meter(len(piece.encode()))
        yield piece


def main() -> int:
    """The exit code: 0, or 2 for a corpus or an option that cannot be used, 1 for a disk that cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--corpus-path", required=True, help="text file, or directory of *.txt files")
    parser.add_argument("--vocab-size", type=int, default=8000, help="ids, special ones included (default: 8000)")
    parser.add_argument("--model-type", choices=["char", "bpe", "unigram"], default="bpe", help="default: bpe")
    parser.add_argument("--output-dir", type=Path, required=True, help="where tokenizer.json goes; created if missing")
    options = parser.parse_args()
    if options.model_type != "char" and options.vocab_size <= SMALLEST_VOCAB:
        parser.error(f"argument --vocab-size: {options.vocab_size} must be more than {SMALLEST_VOCAB} (all bytes)")
    try:
        corpus = check_corpus(find_files(options.corpus_path))
        with Meter("text read", corpus.size, lambda line: print(line, flush=True)) as meter:
            tokenizer = train_tokenizer(options.model_type, _counted(corpus, meter), options.vocab_size)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(options.output_dir / TOKENIZER_FILE, tokenizer.content.encode())
    except (UnusableCorpus, VocabularyError) as error:
        print(f"train_tokenizer.py: error: {error}; choose another corpus or a smaller --vocab-size", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train_tokenizer.py: error: {error}; choose another --output-dir", file=sys.stderr)
        return 1
    print(f"{tokenizer.vocab_size:,} tokens, SHA-256 {tokenizer.digest[:16]}: {options.output_dir / TOKENIZER_FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
