"""Batched generation: greedy or multinomial, with a preallocated key-value cache.

Random numbers come from an explicit generator only, one per sequence and position, drawn
before the first token: a sequence does not depend on how the work is cut into batches, and
training's random state is never touched. The price is inverse-CDF sampling, one cumulative
sum over the vocabulary per token.

Inside the context a token costs one step of the cache, on a GPU the replay of a recorded one. Past it,
the window is cut back to its last half and read again; positions restart there, as learned positions
require.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accel_train.errors import Interrupted
from accel_train.model.cuda_graph import capture
from accel_train.model.transformer import KVCache, StaticCache, TransformerLM

log = logging.getLogger(__name__)

LARGEST_BATCH = {"cpu": 1024, "cuda": 4096}
"""Sequences at a time where memory allows; on two CPU cores 1000 were the fastest of 125 to 1000 (docs/notes.md)."""
_CPU_BYTES = 1 << 30
_PART_OF_GPU_MEMORY = 8
_WORTH_RECORDING = 16
"""Tokens to come."""


def generate(
    model: nn.Module,
    prompts: Tensor,
    length: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Tensor:
    """Continue every prompt to ``length`` tokens.

    The model's mode (training or evaluation) and the global random state are left as found.

    Args:
        model: a :class:`TransformerLM`, or any module that maps tokens ``(batch, time)`` to
            logits ``(batch, time, vocab)``; the latter reads the whole sequence for every
            token, or the window that ``model.config.max_seq_len`` sets if there is one.
        prompts: int64 ``(num, prompt_length)``, at least one token each.
        length: tokens of every result, the prompt included.
        temperature: divides the logits before sampling; 0 takes the most likely token, the one
            of lowest id among equals.
        top_k: sample from the so many most likely tokens only.
        top_p: sample from the fewest tokens whose probabilities add up to this (Holtzman et al. 2020).
        generator: source of randomness, needed for sampling.
        batch_size: sequences at a time; never changes which random numbers a sequence gets. Default: as many as
            are fast on the device, fewer where their keys and values would take more than 1 GiB, or an eighth of the
            GPU's memory. What else lies in memory makes no difference, so neither does it to the bits.
        should_stop: asked before every token.

    Returns:
        int64 ``(num, length)`` on the model's device, the prompts in front.

    Raises:
        ValueError: an argument is out of range, or sampling without a generator.
        Interrupted: ``should_stop`` said so.
    """
    _check_arguments(prompts, length, temperature, top_k, top_p, generator, batch_size)
    num, prompt_length = prompts.shape
    device = next((parameter.device for parameter in model.parameters()), prompts.device)
    tokens = torch.empty(num, length, dtype=torch.int64, device=device)
    tokens[:, :prompt_length] = prompts
    uniform = None
    if generator is not None and temperature > 0:
        shape = (num, length - prompt_length)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device).to(device)
    size = batch_size or default_batch(model, length, device)
    with _evaluating(model):
        for first in range(0, num, size):
            rows = tokens[first : first + size]
            draws = None if uniform is None else uniform[first : first + size]
            for _ in _continued(model, rows, prompt_length, _Sampling(temperature, top_k, top_p), draws, should_stop):
                pass
    return tokens


def default_batch(model: nn.Module, length: int, device: torch.device) -> int:
    """How many sequences of ``length`` tokens :func:`generate` continues at a time on ``device``."""
    largest = LARGEST_BATCH.get(device.type, LARGEST_BATCH["cpu"])
    if not isinstance(model, TransformerLM):
        return largest
    config, weight = model.config, model.token_embedding.weight
    cached = 2 * config.n_layers * config.d_model * min(length, config.max_seq_len)
    needed = (cached + model.vocab_size) * weight.element_size()
    on_gpu = device.type == "cuda"
    allowed = torch.cuda.get_device_properties(device).total_memory // _PART_OF_GPU_MEMORY if on_gpu else _CPU_BYTES
    return max(1, min(largest, allowed // needed))


def stream(
    model: TransformerLM,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Continue one prompt, handing out every token as soon as it is there; arguments as of :func:`generate`."""
    length = len(prompt) + num_tokens
    prompts = torch.tensor([list(prompt)], dtype=torch.int64, device=next(model.parameters()).device)
    _check_arguments(prompts, length, temperature, top_k, top_p, generator, None)
    rows = torch.empty(1, length, dtype=torch.int64, device=prompts.device)
    rows[:, : len(prompt)] = prompts
    draws = None
    if generator is not None and temperature > 0:
        draws = torch.rand((1, num_tokens), generator=generator, dtype=torch.float64, device=generator.device)
        draws = draws.to(prompts.device)
    with _evaluating(model):
        for position in _continued(model, rows, len(prompt), _Sampling(temperature, top_k, top_p), draws, None):
            yield int(rows[0, position])


def _continued(
    model: nn.Module,
    rows: Tensor,
    prompt_length: int,
    sampling: _Sampling,
    draws: Tensor | None,
    should_stop: Callable[[], bool] | None,
) -> Iterator[int]:
    """Fill ``rows`` from ``prompt_length`` on; yields every position as soon as it is filled."""
    logits_at = _CachedLogits(model, rows) if isinstance(model, TransformerLM) else _PlainLogits(model, rows)
    for position in range(prompt_length, rows.shape[1]):
        if should_stop is not None and should_stop():
            raise Interrupted
        with torch.no_grad():  # here, not around the loop: whoever takes the token must not run without gradients
            logits = logits_at(position)
            if draws is None:
                rows[:, position] = logits.argmax(dim=-1)
            else:
                rows[:, position] = _sample(sampling.restricted(logits), draws[:, position - prompt_length])
        yield position


@dataclass(frozen=True)
class _Sampling:
    """How the distribution of the next token is bent before it is drawn from."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def restricted(self, logits: Tensor) -> Tensor:
        """``(batch, vocab)`` logits at this temperature; minus infinity for the tokens left out."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probability = ordered.double().softmax(dim=-1)
            # Left out is what comes after the tokens before it have reached top_p; the first one never.
            beyond = probability.cumsum(dim=-1) - probability >= self.top_p
            logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
        return logits


def _check_arguments(
    prompts: Tensor,
    length: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    batch_size: int | None,
) -> None:
    if prompts.dim() != 2 or prompts.shape[1] < 1:
        raise ValueError(f"prompts must be (num, prompt_length) with at least one token, not {tuple(prompts.shape)}")
    if length < prompts.shape[1]:
        raise ValueError(f"length = {length} is shorter than the prompts of {prompts.shape[1]} tokens")
    if not temperature >= 0:
        raise ValueError(f"temperature = {temperature} must not be negative")
    if temperature > 0 and generator is None:
        raise ValueError(f"sampling at temperature {temperature} needs a generator: the global one is training's")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p} must lie in (0, 1]")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token where the cumulative distribution first exceeds ``uniform``, for each row of ``(batch, vocab)``."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the total, the draw stays below it whatever the rounding of the sum.
    draws = uniform.unsqueeze(1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, draws, right=True).squeeze(1)
    return token.clamp_(max=logits.shape[1] - 1)


def _window(start: int, position: int, context: int) -> int:
    """Where the window that predicts ``position`` begins: at ``start``, or at the last half once it is full."""
    return start if position - start <= context else position - max(context // 2, 1)


class _CachedLogits:
    """Logits of the next token of every row, with a cache that keeps pace."""

    def __init__(self, model: TransformerLM, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.context = model.config.max_seq_len
        self.start = 0
        self.cache: KVCache | None = None
        self._recorded: Callable[[Tensor], Tensor] | None = None

    def __call__(self, position: int) -> Tensor:
        start = _window(self.start, position, self.context)
        if self.cache is None:
            self.cache = self._new_cache(position)
        elif start != self.start:
            self.cache.length = 0  # what is in it is written over
        self.start = start
        tokens = self.rows[:, start + self.cache.length : position]
        if tokens.shape[1] > 1 or not isinstance(self.cache, StaticCache):
            return self.model.extend(tokens, self.cache)
        if self._recorded is None:
            self._recorded = _recorded(self.model, self.cache)
        return self._recorded(tokens)

    def _new_cache(self, position: int) -> KVCache:
        batch, length = self.rows.shape
        kind = StaticCache if _worth_recording(self.rows.device, length - position) else KVCache
        weight = self.model.token_embedding.weight.detach()
        return kind(self.model.config, batch, min(length, self.context), like=weight)


def _worth_recording(device: torch.device, tokens_to_come: int) -> bool:
    """On a GPU a token is some twenty launches a block, and a recording takes the time of a few tokens."""
    return device.type == "cuda" and tokens_to_come >= _WORTH_RECORDING


def _recorded(model: TransformerLM, cache: StaticCache) -> Callable[[Tensor], Tensor]:
    try:
        return _RecordedExtension(model, cache)
    except RuntimeError as error:
        log.warning("tokens are generated kernel by kernel, since a token cannot be recorded: %s", error)
        return lambda tokens: model.extend(tokens, cache)


class _RecordedExtension:
    """One more token for every cached sequence, as a CUDA graph."""

    def __init__(self, model: TransformerLM, cache: StaticCache) -> None:
        self._cache = cache
        self._tokens = torch.zeros(len(cache.keys[0]), 1, dtype=torch.int64, device=cache.position.device)
        # What the passes before the recording write lies where the first token goes.
        cache.position.fill_(cache.length)
        self._logits, self._replay = capture(lambda: model.one_more(self._tokens, cache), cache.position.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, vocab)``, overwritten by the next call."""
        self._tokens.copy_(tokens)
        self._cache.position.fill_(self._cache.length)
        self._replay()
        self._cache.length += 1
        return self._logits


class _PlainLogits:
    """Logits of the next token of every row, from the whole window each time."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.context: int = getattr(getattr(model, "config", None), "max_seq_len", rows.shape[1])
        self.start = 0

    def __call__(self, position: int) -> Tensor:
        self.start = _window(self.start, position, self.context)
        output = self.model(self.rows[:, self.start : position])
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[:, -1]
