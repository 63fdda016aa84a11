"""Key table of the DiT in diffusers' layout (`HunyuanVideo15Transformer3DModel`)."""

from sage_grpo_jax.models.hunyuan_video import HunyuanVideoConfig
from sage_grpo_jax.weights.key_table import Row, linear, norm, with_bias

# Ours -> theirs within one double-stream block, per stream.
_BLOCK = {
    "image": {
        "modulation/linear": "norm1.linear",
        "query": "attn.to_q",
        "key": "attn.to_k",
        "value": "attn.to_v",
        "proj": "attn.to_out.0",
        "mlp/in": "ff.net.0.proj",
        "mlp/out": "ff.net.2",
    },
    "text": {
        "modulation/linear": "norm1_context.linear",
        "query": "attn.add_q_proj",
        "key": "attn.add_k_proj",
        "value": "attn.add_v_proj",
        "proj": "attn.to_add_out",
        "mlp/in": "ff_context.net.0.proj",
        "mlp/out": "ff_context.net.2",
    },
}
_BLOCK_NORMS = {
    "image": {"query_norm": "attn.norm_q", "key_norm": "attn.norm_k"},
    "text": {"query_norm": "attn.norm_added_q", "key_norm": "attn.norm_added_k"},
}
_REFINER_BLOCK = {
    "query": "attn.to_q",
    "key": "attn.to_k",
    "value": "attn.to_v",
    "proj": "attn.to_out.0",
    "mlp/in": "ff.net.0.proj",
    "mlp/out": "ff.net.2",
    "gates/linear": "norm_out.linear",
}


def diffusers_rows(config: HunyuanVideoConfig) -> list[Row]:
    """One row per parameter of `models.hunyuan_video.init_params(config)`."""
    rows = with_bias(("patch_embed",), "x_embedder.proj", "conv3d")
    rows += _two_layers(("time_embed",), "time_embed.timestep_embedder")
    if config.use_meanflow:
        rows += _two_layers(("time_embed_r",), "time_embed.timestep_embedder_r")
    rows.append(Row(("cond_type_embed",), "cond_type_embed.weight", "embedding"))
    rows += _refiner_rows(config.num_refiner_layers)
    if config.text_embed_2_dim is not None:
        rows += norm(("byt5_embed", "norm"), "context_embedder_2.norm")
        for i, ours in enumerate(("in", "mid", "out"), start=1):
            rows += linear(("byt5_embed", ours), f"context_embedder_2.linear_{i}")
    if config.image_embed_dim is not None:
        rows += _two_layers(("image_embed",), "image_embedder")
        for name in ("norm_in", "norm_out"):
            rows += norm(("image_embed", name), f"image_embedder.{name}")
    rows += _block_rows(config.num_layers)
    rows += linear(("final", "modulation", "linear"), "norm_out.linear")
    rows += linear(("final", "proj"), "proj_out")
    return rows


def _refiner_rows(num_layers: int) -> list[Row]:
    rows = linear(("text_refiner", "proj_in"), "context_embedder.proj_in")
    embed = "context_embedder.time_text_embed"
    rows += _two_layers(("text_refiner", "time_embed"), f"{embed}.timestep_embedder")
    rows += _two_layers(("text_refiner", "pooled_embed"), f"{embed}.text_embedder")
    ours, theirs = ("text_refiner", "blocks"), "context_embedder.token_refiner.refiner_blocks.{i}"
    for name in ("norm1", "norm2"):
        rows += norm((*ours, name), f"{theirs}.{name}", num_layers)
    for name, other in _REFINER_BLOCK.items():
        rows += linear((*ours, *name.split("/")), f"{theirs}.{other}", num_layers)
    return rows


def _block_rows(num_layers: int) -> list[Row]:
    rows, theirs = [], "transformer_blocks.{i}"
    for stream, layers in _BLOCK.items():
        for name, other in layers.items():
            ours = ("blocks", stream, *name.split("/"))
            rows += linear(ours, f"{theirs}.{other}", num_layers)
        for name, other in _BLOCK_NORMS[stream].items():
            ours = ("blocks", stream, name, "scale")
            rows.append(Row(ours, f"{theirs}.{other}.weight", "vector", num_layers))
    return rows


def _two_layers(ours: tuple[str, ...], theirs: str) -> list[Row]:
    return linear((*ours, "in"), f"{theirs}.linear_1") + linear(
        (*ours, "out"), f"{theirs}.linear_2"
    )
