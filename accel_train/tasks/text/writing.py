"""Prompts of a text model, and what it writes after them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import nn

from accel_train.data.permutation import Ids
from accel_train.data.windows import WindowDataset
from accel_train.errors import ConfigError
from accel_train.model.generation import stream
from accel_train.model.transformer import TransformerLM
from accel_train.tasks.base import GenerationOptions
from accel_train.tasks.text.config import TextConfig
from accel_train.tasks.text.sample_quality import LANGUAGES, Language, language_of
from accel_train.tasks.text.tokenizer import UNKNOWN, TextTokenizer

_PROMPTS_PER_LANGUAGE, _FEWEST_PROMPTS = 20, 5
_WINDOWS_LOOKED_AT = 400
_DEFAULT_TOKENS = 200
"""Tokens that ``accel-train generate`` writes by default."""
_LONGEST_CHARACTER = 4
"""Bytes, and so tokens, of a character."""


def write(model: nn.Module, tokenizer: TextTokenizer, text: TextConfig, options: GenerationOptions) -> Iterator[str]:
    """Continue a prompt ``options.num`` times, piece by piece as it is written.

    Args:
        model: a :class:`~accel_train.model.transformer.TransformerLM`.
        tokenizer: of the model.
        text: says what ``options`` leave open.
        options: prompt, length and way of sampling.

    Raises:
        ConfigError: the prompt is empty.
    """
    prompt = text.prompt if options.prompt is None else options.prompt
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise ConfigError("--prompt", prompt, "must not be empty: the model continues what is there")
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(options.seed or 0)
    for _ in range(options.num or 1):
        yield tokenizer.decode(ids)
        pending: list[int] = []
        for token in stream(
            cast(TransformerLM, model),
            ids,
            options.max_tokens or _DEFAULT_TOKENS,
            temperature=text.temperature if options.temperature is None else options.temperature,
            top_k=options.top_k or text.top_k,
            top_p=options.top_p or text.top_p,
            generator=generator,
        ):
            pending.append(token)
            piece = tokenizer.decode(pending)
            # The bytes of one character may come in several tokens.
            if not piece.endswith(UNKNOWN) or len(pending) >= _LONGEST_CHARACTER:
                yield piece
                pending = []
        yield tokenizer.decode(pending) + "\n"


def prompt_ids(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Return the ids of a text that is to be continued.

    Subwords carry the space in front of them: one at the end of a prompt would make the model
    write a second.
    """
    return tokenizer.encode(prompt if tokenizer.kind == "char" else prompt.rstrip(" ") or prompt)


def judged_prompts(
    held_out: WindowDataset, tokenizer: TextTokenizer, length: int
) -> tuple[torch.Tensor, list[Language | None]]:
    """Return prompts to judge a model by, and their languages.

    Args:
        held_out: windows that are not trained on.
        tokenizer: of the windows.
        length: tokens of a prompt.

    Returns:
        Beginnings of windows ``(prompts, length)`` int64: of each language, or of any (None) where there are not both.
    """
    inputs, _ = held_out.__getitems__(spread(len(held_out), _WINDOWS_LOOKED_AT))
    languages = [language_of(tokenizer.decode(row[:length].tolist())) for row in inputs]
    counts = Counter(languages)
    if any(counts[language] < _FEWEST_PROMPTS for language in LANGUAGES):
        chosen = spread(len(inputs), len(LANGUAGES) * _PROMPTS_PER_LANGUAGE).tolist()
        return inputs[chosen, :length], [None] * len(chosen)
    chosen = []
    for language in LANGUAGES:
        places = [place for place, found in enumerate(languages) if found == language]
        chosen += [places[i] for i in spread(len(places), _PROMPTS_PER_LANGUAGE)]
    return inputs[chosen, :length], [languages[place] for place in chosen]


def spread(length: int, count: int) -> Ids:
    """Return at most ``count`` places in ``range(length)``, evenly spread, in order."""
    count = min(length, count)
    return np.arange(count, dtype=np.int64) * length // max(count, 1)
