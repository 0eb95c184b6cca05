"""Batched generation: greedy or multinomial, with a preallocated key-value cache.

Random numbers come from an explicit generator only, one per sequence and position, and are
drawn before the first token. So a sequence does not depend on the size of the batches, and
generation leaves the random state of training as it is. The price is inverse-CDF sampling: one
cumulative sum over the vocabulary per token.

Within the context a token costs one step with the cache, on a GPU the replay of a CUDA graph. When
the context is full, the window is cut to its last half and read again; positions restart there, as
learned positions require.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accel_train.errors import Interrupted
from accel_train.model.cuda_graph import capture
from accel_train.model.kernels.distinct_places import distinct_places
from accel_train.model.kv_cache import KVCache, StaticCache
from accel_train.model.size import is_out_of_memory
from accel_train.model.transformer import TransformerLM
from accel_train.process.work import StopCheck, never

log = logging.getLogger(__name__)

_LARGEST_BATCH = {"cpu": 1024, "cuda": 4096}
"""Sequences at a time if memory allows; of 125 to 1000, 1000 were the fastest on two CPU cores (docs/notes.md)."""
_CPU_CACHE_BYTES = 1 << 30
_GPU_MEMORY_DIVISOR = 8
_MIN_TOKENS_TO_RECORD = 16
"""Recording a CUDA graph takes the time of a few tokens; a token without one is some twenty launches per block."""

_kept: ContextVar[dict[tuple[int, int, int], _CachedLogits] | None] = ContextVar("kept", default=None)
"""Recordings by model, batch and capacity, while somebody keeps them."""


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

    The model's mode (training or evaluation) and the global random state stay as they are.

    Args:
        model: a :class:`TransformerLM`, or any module that maps tokens ``(batch, time)`` to
            logits ``(batch, time, vocab)``. The latter reads the whole sequence for every
            token, or the window of ``model.config.max_seq_len`` tokens if it has that attribute.
        prompts: int64 ``(num, prompt_length)``, at least one token each.
        length: tokens of every result, the prompt included.
        temperature: divides the logits before sampling; 0 takes the most likely token, of equally
            likely ones the one of lowest id.
        top_k: sample from the ``top_k`` most likely tokens.
        top_p: sample from the fewest tokens whose probabilities add up to ``top_p`` (Holtzman et al. 2020).
        generator: source of random numbers; sampling needs one.
        batch_size: sequences at a time; does not change the random numbers of a sequence. Default:
            :func:`default_batch`, which does not depend on what else lies in memory, so that the bits do not either.
            Half as many, with a warning, whenever memory runs out.
        should_stop: called before every token; True ends generation.

    Returns:
        int64 ``(num, length)`` on the model's device, each row beginning with its prompt.

    Raises:
        ValueError: an argument is out of range, or ``temperature`` is positive without a generator.
        Interrupted: ``should_stop()`` returned True.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1")
    sampling = _Sampling(temperature, top_k, top_p, generator)
    device = next((parameter.device for parameter in model.parameters()), prompts.device)
    tokens, prompt_length = _rows(prompts, length, device), prompts.shape[1]
    uniform = sampling.draws(len(prompts), length - prompt_length, device)
    size = batch_size or default_batch(model, length, device)
    first = 0
    with _evaluation_mode(model), keep_recordings() as kept:
        while first < len(prompts):
            rows = tokens[first : first + size]
            draws = None if uniform is None else uniform[first : first + size]
            try:
                for _ in _continue(model, rows, prompt_length, sampling, draws, should_stop or never):
                    pass
                first += size
                continue
            except (MemoryError, RuntimeError) as error:
                if len(rows) == 1 or not is_out_of_memory(error):
                    raise
                size = len(rows) // 2
                log.warning("out of memory while %d sequences were generated at a time: now %d", len(rows), size)
            # Not in the handler: the traceback holds what the failed attempt computed.
            kept.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return tokens


@contextmanager
def keep_recordings() -> Iterator[dict[tuple[int, int, int], _CachedLogits]]:
    """Let all calls of :func:`generate` in this context share their recordings on a GPU, by model, batch and capacity.

    To be left before the model's weights move to other addresses; the memory is free again afterwards.
    """
    outer = _kept.get()
    kept = {} if outer is None else outer
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def default_batch(model: nn.Module, length: int, device: torch.device) -> int:
    """Return how many sequences of ``length`` tokens :func:`generate` continues at a time on ``device``.

    As many as are fast there; fewer if their keys, values and logits take more than 1 GiB, or an eighth of a GPU's
    memory.
    """
    largest = _LARGEST_BATCH.get(device.type, _LARGEST_BATCH["cpu"])
    if not isinstance(model, TransformerLM):
        return largest
    config, weight = model.config, model.token_embedding.weight
    cached = 2 * config.n_layers * config.d_model * min(length, config.max_seq_len)
    needed = (cached + model.vocab_size) * weight.element_size()
    allowed = _CPU_CACHE_BYTES
    if device.type == "cuda":
        allowed = torch.cuda.get_device_properties(device).total_memory // _GPU_MEMORY_DIVISOR
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
    """Continue one prompt and yield every token as soon as it is chosen.

    Args:
        model: the model.
        prompt: token ids, at least one.
        num_tokens: tokens to generate.
        temperature: as in :func:`generate`.
        top_k: as in :func:`generate`.
        top_p: as in :func:`generate`.
        generator: as in :func:`generate`.

    Raises:
        ValueError: as in :func:`generate`.
    """
    sampling = _Sampling(temperature, top_k, top_p, generator)
    device = next(model.parameters()).device
    rows = _rows(torch.tensor([list(prompt)], dtype=torch.int64), len(prompt) + num_tokens, device)
    draws = sampling.draws(1, num_tokens, device)
    with _evaluation_mode(model):
        for position in _continue(model, rows, len(prompt), sampling, draws, never):
            yield int(rows[0, position])


def _rows(prompts: Tensor, length: int, device: torch.device) -> Tensor:
    """Return int64 ``(num, length)`` on ``device``, of which only the prompts are written."""
    if prompts.dim() != 2 or prompts.shape[1] < 1:
        raise ValueError(f"prompts must be (num, prompt_length) with at least one token, not {tuple(prompts.shape)}")
    if length < prompts.shape[1]:
        raise ValueError(f"length = {length} is shorter than the prompts of {prompts.shape[1]} tokens")
    rows = torch.empty(len(prompts), length, dtype=torch.int64, device=device)
    rows[:, : prompts.shape[1]] = prompts
    return rows


def _continue(
    model: nn.Module, rows: Tensor, start: int, sampling: _Sampling, draws: Tensor | None, should_stop: StopCheck
) -> Iterator[int]:
    """Fill ``rows`` from ``start`` on and yield every position as soon as it is filled."""
    logits_at = _cached_logits(model, rows, start) if isinstance(model, TransformerLM) else _UncachedLogits(model, rows)
    for position in range(start, rows.shape[1]):
        if should_stop():
            raise Interrupted
        with torch.no_grad():  # not around the loop: the caller runs between tokens, and keeps its gradients
            logits = logits_at(position)
            if draws is None:
                rows[:, position] = logits.argmax(dim=-1)
            else:
                rows[:, position] = _sample(sampling.restricted(logits), draws[:, position - start])
        yield position


@dataclass(frozen=True)
class _Sampling:
    """How the next token is drawn, and how its distribution is changed before."""

    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature = {self.temperature} must not be negative")
        if self.temperature > 0 and self.generator is None:
            raise ValueError(
                f"sampling at temperature {self.temperature} needs a generator: the global one is training's"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")

    def draws(self, num: int, length: int, device: torch.device) -> Tensor | None:
        """Return a random number for every token, float64 ``(num, length)`` in [0, 1); None at temperature 0."""
        if self.generator is None or self.temperature == 0:
            return None
        source = self.generator
        return torch.rand((num, length), generator=source, dtype=torch.float64, device=source.device).to(device)

    def restricted(self, logits: Tensor) -> Tensor:
        """Divide ``(batch, vocab)`` logits by the temperature and set those of excluded tokens to minus infinity."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probability = ordered.double().softmax(dim=-1)
            # A token is excluded if the more likely ones reach top_p without it; the most likely one never is.
            excluded = _cumulative(probability) - probability >= self.top_p
            with distinct_places():
                logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
        return logits


def _cumulative(probability: Tensor) -> Tensor:
    """Return the sums of ``(batch, vocab)`` probabilities up to each token, float64.

    On a GPU in units of 2**-52, as integers: PyTorch has no deterministic sum of floats there, since the order of the
    additions may differ, and sums of integers are exact in any order.
    """
    if _is_on_cpu(probability):
        return probability.cumsum(dim=-1)
    return (probability * 2.0**52).long().cumsum(dim=-1).double() * 2.0**-52


def _is_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _sample(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the token of each row of ``(batch, vocab)`` where the cumulative distribution exceeds ``uniform``."""
    cumulative = _cumulative(logits.double().softmax(dim=-1))
    # Scaled by the total, a draw stays below it, however the sum is rounded.
    draws = uniform.unsqueeze(1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, draws, right=True).squeeze(1)
    return token.clamp_(max=logits.shape[1] - 1)


def _window_start(start: int, position: int, context: int) -> int:
    """Return where the window that predicts ``position`` begins: at ``start``, or at its last half once it is full."""
    return start if position - start <= context else position - max(context // 2, 1)


class _CachedLogits:
    """Logits of the next token of every row, by way of a key-value cache."""

    def __init__(self, model: TransformerLM, batch: int, capacity: int, kind: type[KVCache]) -> None:
        self.model, self.context = model, model.config.max_seq_len
        self.cache = model.new_cache(batch, capacity, kind)
        self._extend_by_graph: Callable[[Tensor], Tensor] | None = None

    def begin(self, rows: Tensor) -> _CachedLogits:
        """Turn to other rows, of which nothing has been read."""
        self.rows, self.start, self.cache.length = rows, 0, 0
        return self

    def __call__(self, position: int) -> Tensor:
        start = _window_start(self.start, position, self.context)
        if start != self.start:
            self.start, self.cache.length = start, 0  # the window is read again
        tokens = self.rows[:, start + self.cache.length : position]
        if tokens.shape[1] > 1 or not isinstance(self.cache, StaticCache):
            return self.model.extend(tokens, self.cache)
        if self._extend_by_graph is None:
            self._extend_by_graph = _record_extension(self.model, self.cache)
        return self._extend_by_graph(tokens)


def _cached_logits(model: TransformerLM, rows: Tensor, first: int) -> _CachedLogits:
    """Return the logits of ``rows`` from ``first`` on; those that are recorded may be kept from an earlier batch."""
    batch, length = rows.shape
    capacity = min(length, model.config.max_seq_len)
    if not _should_record(rows.device, length - first):
        return _CachedLogits(model, batch, capacity, KVCache).begin(rows)
    outer, key = _kept.get(), (id(model), batch, capacity)
    kept = {} if outer is None else outer
    if key not in kept:
        kept[key] = _CachedLogits(model, batch, capacity, StaticCache)
    return kept[key].begin(rows)


def _should_record(device: torch.device, num_tokens: int) -> bool:
    return device.type == "cuda" and num_tokens >= _MIN_TOKENS_TO_RECORD


def _record_extension(model: TransformerLM, cache: StaticCache) -> Callable[[Tensor], Tensor]:
    """Return a CUDA graph that adds one token to every cached sequence, or the same kernel by kernel.

    It maps tokens ``(batch, 1)`` to logits ``(batch, vocab)``, which the next call overwrites.
    """
    added = torch.zeros(len(cache.keys[0]), 1, dtype=torch.int64, device=cache.position.device)
    # The passes before the recording write to the place of the first token, which overwrites it.
    cache.position.fill_(cache.length)
    try:
        logits, replay = capture(lambda: model.extend_static(added, cache), cache.position.device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        log.warning("tokens are generated kernel by kernel, since a token cannot be recorded: %s", error)
        return lambda tokens: model.extend(tokens, cache)

    def extend(tokens: Tensor) -> Tensor:
        added.copy_(tokens)
        cache.position.fill_(cache.length)
        replay()
        cache.length += 1
        return logits

    return extend


class _UncachedLogits:
    """Logits of the next token of every row; reads the whole window for each."""

    def __init__(self, model: nn.Module, rows: Tensor) -> None:
        self.model, self.rows = model, rows
        self.context: int = getattr(getattr(model, "config", None), "max_seq_len", rows.shape[1])
        self.start = 0

    def __call__(self, position: int) -> Tensor:
        self.start = _window_start(self.start, position, self.context)
        output = self.model(self.rows[:, self.start : position])
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[:, -1]
