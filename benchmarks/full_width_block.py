"""A double-stream block of the full model, forward and backward, here and in PyTorch.

    python benchmarks/full_width_block.py --tokens=18018                        # a GPU, bfloat16
    JAX_PLATFORMS=cpu python benchmarks/full_width_block.py --tokens=64 --heads=2 --repeats=2

18,018 image tokens are one 480p clip of 81 frames (21 x 22 x 39). The PyTorch side is diffusers'
block with the same weights, and fused attention (`scaled_dot_product_attention` without a mask, the
form that flash attention takes; all tokens count on both sides); --compile puts it through
torch.compile. Backward is with respect to parameters and tokens. Outputs and gradients are compared
before anything is timed; the sides take turns. Operations are those of the matrix products and of
attention, backward twice the forward, nothing for what is computed again; the ceiling is the best
of a few large products in the same type and the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Both libraries share one device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_hunyuan_video15 as reference
from flax import traverse_util

from sage_grpo_jax.models import double_stream, layer_stack, rope
from sage_grpo_jax.models.hunyuan_video_config import HunyuanVideoConfig
from sage_grpo_jax.weights.tables import hunyuan_video_keys

PREFIX = "transformer_blocks.0."
# Of the largest number on the other side; bfloat16 has 8 bits.
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3}


def make_config(args: argparse.Namespace) -> HunyuanVideoConfig:
    return HunyuanVideoConfig(
        num_layers=1, num_attention_heads=args.heads, dtype=args.dtype, remat=False
    )


def make_params(config: HunyuanVideoConfig) -> dict[str, Any]:
    """Random weights of one block [1, ...], none of them 0; NumPy float32."""
    # Shapes only: an initialisation would leave biases and modulation at 0, and with them parts of
    # the gradient.
    block = double_stream.Block(config)

    def init(key):
        tokens, width = jnp.zeros((1, 1, config.hidden_size)), config.attention_head_dim
        tables = (jnp.ones((1, width)), jnp.zeros((1, width)))
        return block.init(key, (tokens, tokens), jnp.zeros((1, config.hidden_size)), None, tables)

    shapes = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0))["params"])

    rng, params = np.random.default_rng(0), {}
    for path, box in shapes.items():
        shape = box.value.shape
        scale = shape[0] ** -0.5 if len(shape) == 2 else 0.1
        # Scales of norms are around 1, as trained ones are.
        values = scale * rng.standard_normal((1, *shape), np.float32)
        params[path] = values + (path[-1] == "scale")
    return traverse_util.unflatten_dict(params)


class FusedAttention:
    """diffusers' attention processor of this block, without the mask that rules flash out."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
    ):
        def split(x):
            return x.unflatten(2, (attn.heads, -1))

        # Image tokens, turned by their place; text tokens, which have none.
        query = attn.norm_q(split(attn.to_q(hidden_states)))
        key = attn.norm_k(split(attn.to_k(hidden_states)))
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        text_query = attn.norm_added_q(split(attn.add_q_proj(encoder_hidden_states)))
        text_key = attn.norm_added_k(split(attn.add_k_proj(encoder_hidden_states)))
        value = split(attn.to_v(hidden_states)), split(attn.add_v_proj(encoder_hidden_states))

        # [B, heads, image + text, channels].
        joined = ((query, text_query), (key, text_key), value)
        query, key, value = (torch.cat(pair, 1).transpose(1, 2) for pair in joined)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(2, 3)
        count = hidden_states.shape[1]
        return attn.to_out[0](out[:, :count]), attn.to_add_out(out[:, count:])


def make_torch_block(config: HunyuanVideoConfig, params: Any, device: str) -> torch.nn.Module:
    """diffusers' block with our weights, in the compute dtype."""
    block = reference.HunyuanVideo15TransformerBlock(
        config.num_attention_heads, config.attention_head_dim, config.mlp_ratio
    )
    # Our first layer of the stack, renamed by the table that conversions use.
    flat, tensors = traverse_util.flatten_dict({"blocks": params}), {}
    for row in hunyuan_video_keys.diffusers_rows(config):
        if row.ours in flat:
            (name,) = row.names()
            values = np.ascontiguousarray(row.layout.to_theirs(flat[row.ours][0]))
            tensors[name.removeprefix(PREFIX)] = torch.tensor(values)

    # Strict: a name that is missing or too much is an error.
    block.load_state_dict(tensors)
    block.attn.set_processor(FusedAttention())
    return block.to(device=device, dtype=getattr(torch, config.dtype))


def make_inputs(config: HunyuanVideoConfig, args: argparse.Namespace) -> dict[str, np.ndarray]:
    rng, width = np.random.default_rng(1), config.hidden_size
    return {
        "image": rng.standard_normal((args.batch, args.tokens, width), np.float32),
        "text": rng.standard_normal((args.batch, args.text_tokens, width), np.float32),
        "vector": rng.standard_normal((args.batch, width), np.float32),
        # Frames of the height and width of a 480p clip do not matter here: one long row.
        "angles": np.asarray(
            rope.rotary_angles((1, 1, args.tokens), config.rope_axes_dim, config.rope_theta)
        ),
    }


def jax_side(config: HunyuanVideoConfig, params: Any, inputs: dict) -> dict[str, Callable]:
    """{"forward", "backward"}: functions without arguments that return when the result is there."""
    # Everything on the device before the clock starts.
    dtype = jnp.dtype(config.dtype)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    tokens = tuple(jnp.asarray(inputs[name], dtype) for name in ("image", "text"))
    vector = jnp.asarray(inputs["vector"])
    tables = rope.rotary_tables(jnp.asarray(inputs["angles"]), tokens[0].shape[1])

    block = double_stream.Block(config)

    def apply_one(params, tokens):
        return block.apply({"params": params}, tokens, vector, None, tables)[0]

    def apply(params, tokens):
        return layer_stack.run(apply_one, tokens, params, remat=config.remat, unroll=config.unroll)

    def loss(params, tokens):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in apply(params, tokens))

    # JAX returns before it has computed: each call waits for its result.
    forward, backward = jax.jit(apply), jax.jit(jax.grad(loss, argnums=(0, 1)))
    return {
        "forward": lambda: jax.block_until_ready(forward(params, tokens)),
        "forward and backward": lambda: jax.block_until_ready(backward(params, tokens)),
    }


def torch_side(
    config: HunyuanVideoConfig, block: torch.nn.Module, inputs: dict, args: argparse.Namespace
) -> dict[str, Callable]:
    """The same in PyTorch."""
    device, dtype = next(block.parameters()).device, getattr(torch, config.dtype)

    def put(x: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(np.asarray(x), device=device, dtype=dtype)

    image, text = (put(inputs[name], dtype).requires_grad_() for name in ("image", "text"))
    vector = put(inputs["vector"], dtype)
    # diffusers wants every angle twice, for the two channels that it turns.
    angles = np.repeat(inputs["angles"], 2, axis=-1)
    tables = put(np.cos(angles), torch.float32), put(np.sin(angles), torch.float32)

    apply = torch.compile(block) if args.compile else block

    def finish(result: Any) -> Any:
        # PyTorch too returns before it has computed.
        if device.type == "cuda":
            torch.cuda.synchronize()
        return result

    @torch.no_grad()
    def forward():
        return finish(apply(image, text, vector, None, tables))

    def backward():
        leaves = [*block.parameters(), image, text]
        loss = sum((x.float() ** 2).sum() for x in apply(image, text, vector, None, tables))
        return finish(torch.autograd.grad(loss, leaves))

    return {"forward": forward, "forward and backward": backward}


def check(ours: dict[str, Callable], theirs: dict[str, Callable], dtype: str) -> None:
    """Outputs and the gradients of the tokens agree, or it is an error."""
    # The last two gradients are those of image and text tokens on both sides.
    pairs = [
        *zip(ours["forward"](), theirs["forward"](), strict=True),
        *zip(ours["forward and backward"]()[1], theirs["forward and backward"]()[-2:], strict=True),
    ]
    names = ("image", "text", "gradient of image", "gradient of text")
    for name, (mine, other) in zip(names, pairs, strict=True):
        mine, other = np.asarray(mine, np.float32), other.detach().float().cpu().numpy()
        # Of the largest number: small values are lost in bfloat16's rounding.
        error = float(np.abs(mine - other).max() / np.abs(other).max())
        print(f"difference of {name}: {error:.1e}")
        if not error <= TOLERANCE[dtype]:
            raise SystemExit(f"error: {name} of the sides differ by {error} of the largest number")


def operations(config: HunyuanVideoConfig, args: argparse.Namespace) -> dict[str, float]:
    """Floating-point operations of one call."""
    # A multiply and an add count as two. Per token: four projections of attention, two products of
    # the MLP; attention itself is two products of [length, length].
    length, width = args.tokens + args.text_tokens, config.hidden_size
    products = 2 * length * width**2 * (4 + 2 * config.mlp_ratio)
    forward = args.batch * (products + 4 * length**2 * width)
    return {"forward": forward, "forward and backward": 3 * forward}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median; the first call is not counted."""
    function()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def ceilings(args: argparse.Namespace, device: str) -> dict[str, float]:
    """Operations per second of the best large product, on each side."""
    # What a device reaches is less than its data sheet says, and depends on the size.
    best = {"JAX": 0.0, "PyTorch": 0.0}
    for size in args.products:
        x = np.random.default_rng(0).standard_normal((size, size), np.float32)
        mine = jnp.asarray(x, jnp.dtype(args.dtype))
        product = jax.jit(jnp.matmul)
        other = torch.tensor(x, device=device, dtype=getattr(torch, args.dtype))

        def torch_product(other=other):
            result = other @ other
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        for name, function in (
            ("JAX", lambda p=product, x=mine: jax.block_until_ready(p(x, x))),
            ("PyTorch", torch_product),
        ):
            best[name] = max(best[name], 2 * size**3 / seconds(function, args.repeats))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=18018, help="image tokens")
    parser.add_argument("--text_tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16, help="of 128 channels")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--products", type=int, nargs="+", help="sizes of the products")
    parser.add_argument("--compile", action="store_true", help="torch.compile on the other side")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()

    # On which device; both sides must be on the same one.
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("error: JAX sees a GPU and PyTorch does not: install PyTorch with CUDA")
    device = "cuda" if on_gpu else "cpu"
    args.products = args.products or ([4096, 8192, 16384] if on_gpu else [1024])
    print(f"{jax.devices()[0].device_kind}; {vars(args)}", flush=True)

    # Equal first, then timed.
    config = make_config(args)
    params, inputs = make_params(config), make_inputs(config, args)
    ours = jax_side(config, params, inputs)
    theirs = torch_side(config, make_torch_block(config, params, device), inputs, args)
    check(ours, theirs, args.dtype)

    ceiling, count = ceilings(args, device), operations(config, args)
    print(f"\nceiling: {', '.join(f'{n} {v / 1e12:.3f} TFLOP/s' for n, v in ceiling.items())}\n")
    print("| | JAX | PyTorch | ratio | JAX, share of the ceiling | PyTorch |")
    print("|---" * 6 + "|")
    top = max(ceiling.values())
    for name in ours:
        mine, other = (seconds(side[name], args.repeats) for side in (ours, theirs))
        shares = [f"{100 * count[name] / (t * top):.0f} %" for t in (mine, other)]
        print(
            f"| {name} | {1e3 * mine:.2f} ms | {1e3 * other:.2f} ms | {other / mine:.2f} "
            f"| {shares[0]} | {shares[1]} |"
        )


if __name__ == "__main__":
    main()
