"""A small decoder in flax nnx, and sampling from it with a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

Cache = tuple[jax.Array, jax.Array]  # keys and values, [batch, heads, length, width]


class Block(nnx.Module):
    """Attention with rotary positions, and a gated MLP, each behind a norm."""

    def __init__(self, hidden: int, heads: int, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = nnx.initializers.normal(0.06)  # smaller, a narrow model starts slowly
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.heads = heads
        self.before, self.between = (nnx.RMSNorm(hidden, rngs=rngs) for _ in range(2))
        self.qkv, self.out = linear(hidden, 3 * hidden), linear(hidden, hidden)
        self.gate, self.down = linear(hidden, 6 * hidden), linear(3 * hidden, hidden)

    def __call__(
        self, x: jax.Array, position: jax.Array, visible: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """Rows ``x`` [B, T, hidden] at ``position`` [T]; ``visible`` [B, 1, T, keys]."""
        qkv = self.qkv(self.before(x)).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, (2, 3), (0, 2))  # [B, heads, T, width] each
        q, k = rotated(q, position), rotated(k, position)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, position[0], axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, position[0], axis=2)
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5
        p = jax.nn.softmax(jnp.where(visible, scores, -1e9))
        seen = jnp.moveaxis(jnp.einsum("bhts,bhsd->bhtd", p, v), 1, 2)
        x = x + self.out(seen.reshape(x.shape))
        gate, up = jnp.split(self.gate(self.between(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up), (k, v)


class Decoder(nnx.Module):
    """Token ids [B, T] to logits [B, T, V]; input and output embeddings are one."""

    def __init__(
        self, vocab_size: int, hidden: int, layers: int, heads: int = 4, *, rngs: nnx.Rngs
    ) -> None:
        init = nnx.initializers.normal(0.06)
        self.embed = nnx.Embed(vocab_size, hidden, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(hidden, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(hidden, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """All positions at once. Padding on the right is never looked at."""
        position = jnp.arange(ids.shape[1])
        visible = position <= position[:, None]
        x = self.embed(ids)
        for block in self.blocks:
            x, _ = block(x, position, visible)
        return self.embed.attend(self.norm(x))

    def step(
        self, token: jax.Array, position: jax.Array, starts: jax.Array, caches: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """Logits [B, V] behind one more ``token`` [B]; row b begins at ``starts[b]``."""
        keys = jnp.arange(caches[0][0].shape[2])
        visible = (keys <= position) & (keys >= starts[:, None])
        x, out = self.embed(token)[:, None], []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, kept = block(x, position[None], visible[:, None, None], cache)
            out.append(kept)
        return self.embed.attend(self.norm(x))[:, 0], out


def rotated(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary positions."""
    half = x.shape[-1] // 2
    angle = position[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def decode(
    model: Decoder,
    prompts: jax.Array,
    starts: jax.Array,
    max_new_tokens: int,
    eos_token_id: int,
    key: jax.Array,
) -> jax.Array:
    """Continues left-padded prompts at temperature 1, int [B, max_new_tokens].

    Behind the first end token there are only end tokens.
    """
    batch, length = prompts.shape
    block = model.blocks[0]
    shape = (batch, block.heads, length + max_new_tokens, block.out.in_features // block.heads)

    @nnx.jit
    def run(model: Decoder) -> jax.Array:
        caches = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in model.blocks]

        def body(carry, position):
            token, caches = carry
            logits, caches = model.step(token, position, starts, caches)
            drawn = jax.random.categorical(jax.random.fold_in(key, position), logits)
            drawn = jnp.where(token == eos_token_id, eos_token_id, drawn)
            given = prompts[:, jnp.minimum(position + 1, length - 1)]
            token = jnp.where(position + 1 < length, given, drawn).astype(prompts.dtype)
            return (token, caches), token

        _, tokens = jax.lax.scan(
            body, (prompts[:, 0], caches), jnp.arange(length + max_new_tokens - 1)
        )
        return tokens[length - 1 :].T

    return run(model)
