"""The language model: a GPT-2-style pre-norm decoder (Radford et al. 2019).

One file, one model. With learned positions it computes exactly what a transformers
``GPT2LMHeadModel`` of the same sizes computes; rotary positions (Su et al. 2021) are the one
variation. The model has no buffers, because DDP would broadcast them before every forward
pass: the rotary angles are computed in each one, which costs microseconds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from accel_train.config.sections import ModelConfig
from accel_train.model.extraction import Extraction, ExtractionMode, Recorder
from accel_train.model.kernels.attention import Angles, causal_attention, should_store_weights
from accel_train.model.kernels.cross_entropy import linear_cross_entropy
from accel_train.model.kernels.pointwise import Dropout, gelu
from accel_train.model.kv_cache import KVCache, StaticCache

INIT_STD = 0.02
ROTARY_BASE = 10_000.0


def rotary_angles(start: int, end: int, head_width: int, like: Tensor) -> Angles:
    """Return cosine and sine of the rotation of positions ``start`` to ``end - 1``, ``(time, head_width)`` each."""
    exponents = torch.arange(0, head_width, 2, device=like.device, dtype=torch.float32) / head_width
    positions = torch.arange(start, end, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, ROTARY_BASE**-exponents).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _heads(packed: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``(batch, time, 3, heads, head_width)`` into rotated queries and keys, and values, each per head."""
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    if angles is not None:
        query, key = _rotate(query, *angles), _rotate(key, *angles)
    return query, key, value


_MANY_SINGLE_QUERIES = 1024
"""From this product of sequences and heads on, two batched products are faster on a CPU than the attention kernel."""


def _single_query_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with one query ``(batch, heads, 1, head_width)`` per head to ``(batch, heads, time, head_width)``."""
    return torch.softmax((query * query.shape[3] ** -0.5) @ key.transpose(2, 3), dim=-1) @ value


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads = layer, config.n_heads
        self.dropout = config.dropout if config.attention_dropout is None else config.attention_dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.output = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, angles: Angles | None, recorder: Recorder | None, cache: KVCache | None) -> Tensor:
        """Map ``(batch, time, d_model)`` to the same shape."""
        batch, time, width = x.shape
        packed = self.qkv(x).view(batch, time, 3, self.n_heads, -1)
        if recorder is not None:
            recorder.record_attention(*_heads(packed, angles))
        dropout = self.dropout if self.training else 0.0
        if cache is None and not dropout and should_store_weights(packed):
            return self.output(causal_attention(packed, angles))  # type: ignore[no-any-return]
        query, key, value = _heads(packed, angles)
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
        # A single query attends to every cached key; several queries start from an empty cache.
        # A branch, not an expression: the compiler may take the length for a variable, and attention needs a bool.
        causal = False
        if time > 1:
            causal = True
        elif type(cache) is KVCache and x.device.type == "cpu" and batch * self.n_heads >= _MANY_SINGLE_QUERIES:
            mixed = _single_query_attention(query, key, value)
            return self.output(mixed.reshape(batch, time, width))  # type: ignore[no-any-return]
        visible = cache.visible if isinstance(cache, StaticCache) else None
        mixed = functional.scaled_dot_product_attention(query, key, value, visible, dropout_p=dropout, is_causal=causal)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, width))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two linear layers with a GELU (tanh approximation, as GPT-2) between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.feed_forward_width)
        self.output = nn.Linear(config.feed_forward_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, d_model)`` to the same shape."""
        return self.output(gelu(self.up(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-norm transformer block: attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, angles: Angles | None, recorder: Recorder | None, cache: KVCache | None) -> Tensor:
        """Map the residual stream ``(batch, time, d_model)`` to the next one."""
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, recorder, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class TransformerLM(nn.Module):
    """A decoder-only transformer language model.

    Initialised as GPT-2 is, from torch's global generator; seed that for a reproducible model.
    Weights are normal with standard deviation 0.02, divided by ``sqrt(2 * n_layers)`` in the
    two layers per block that write to the residual stream; biases are zero.

    Args:
        config: sizes, dropout and kind of positions.
        vocab_size: number of tokens.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        # Tied weights are one parameter under one name, so that nothing else has to know about sharing.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=residual_std if name.endswith(".output") else INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, mode: ExtractionMode = ExtractionMode.NONE, *, targets: Tensor | None = None
    ) -> Tensor | Extraction:
        """Return the logits of the next token at every position, or their loss.

        Args:
            tokens: int64 ``(batch, time)``, with ``time <= config.max_seq_len``.
            mode: tensors to return beside the logits.
            targets: int64 ``(batch, time)``, the token that follows each of ``tokens``. With them the mean
                cross-entropy is returned, and the logits are never held all at once.

        Returns:
            Logits ``(batch, time, vocab)``; with a mode other than ``NONE`` an
            :class:`~accel_train.model.extraction.Extraction` with the same logits, bit for bit
            (if both are computed with gradients, or both without);
            with ``targets`` a scalar, in nats per token.

        Raises:
            ValueError: more tokens than the context holds.
        """
        if targets is not None:
            x = self.final_norm(self._residual(tokens))
            return linear_cross_entropy(x.flatten(0, 1), self._output_weight, targets.flatten())
        recorder = None if mode is ExtractionMode.NONE else Recorder(mode)
        logits = self._logits(self._residual(tokens, recorder))
        return logits if recorder is None else recorder.extraction(logits)

    def new_cache(self, batch: int, capacity: int, kind: type[KVCache] = KVCache) -> KVCache:
        """Return an empty cache for :meth:`extend`, of ``capacity`` tokens per sequence."""
        return kind(self.config, batch, capacity, like=self.token_embedding.weight.detach())

    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Add tokens to the cached sequences and predict the next one.

        Args:
            tokens: int64 ``(batch, time)``: the prompt for an empty cache, one token after that.
            cache: from :meth:`new_cache`; updated.

        Returns:
            Logits ``(batch, vocab)`` of the token after the last one.

        Raises:
            ValueError: more tokens than the context holds, or several for a cache that is not empty.
        """
        if cache.length and tokens.shape[1] != 1:
            raise ValueError(f"a cache in use takes one token at a time, not {tokens.shape[1]}")
        x = self._residual(tokens, cache=cache)
        cache.length += tokens.shape[1]
        return self._logits(x[:, -1])

    def extend_static(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        """Compute :meth:`extend` for one token at ``cache.position``, in a way that a CUDA graph can record.

        It reads nothing back from the device and leaves ``cache.length`` as it is. Without gradients only.

        Args:
            tokens: int64 ``(batch, 1)``.
            cache: its keys and values are updated.

        Returns:
            Logits ``(batch, vocab)`` of the token after it.
        """
        cache.adding = True
        try:
            return self._logits(self._residual(tokens, cache=cache)[:, -1])
        finally:
            cache.adding = False

    def _residual(self, tokens: Tensor, recorder: Recorder | None = None, cache: KVCache | None = None) -> Tensor:
        """Return the residual stream after the last block, ``(batch, time, d_model)``."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        context = self.config.max_seq_len
        if end > context:
            raise ValueError(f"{end} tokens do not fit into the context of {context} (model.max_seq_len)")
        x = self.token_embedding(tokens)
        angles = None
        head_width = self.config.d_model // self.config.n_heads
        if isinstance(cache, StaticCache) and cache.visible is not None:
            # The position is known on the device only.
            if self.position_embedding is None:
                cos, sin = rotary_angles(0, context, head_width, like=x)
                angles = cos[cache.position], sin[cache.position]
            else:
                x = x + self.position_embedding(cache.position)
        elif self.position_embedding is None:
            angles = rotary_angles(start, end, head_width, like=x)
        else:
            x = x + self.position_embedding.weight[start:end]
        x = self.dropout(x)
        for block in self.blocks:
            if recorder is not None:
                recorder.record(ExtractionMode.RESIDUAL, x)
            x = block(x, angles, recorder, cache)
        if recorder is not None:
            recorder.record(ExtractionMode.RESIDUAL, x)
        return x  # type: ignore[no-any-return]

    def _logits(self, x: Tensor) -> Tensor:
        return functional.linear(self.final_norm(x), self._output_weight)

    @property
    def _output_weight(self) -> Tensor:
        return self.token_embedding.weight if self.head is None else self.head.weight
