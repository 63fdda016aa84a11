"""Wan 2.1 through the converter and as adapters, against diffusers' models and peft."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import wan_vae_oracle
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from flax import traverse_util
from wan_oracle import TINY, make_inputs, make_oracle, oracle_output

from sage_grpo_jax import weights
from sage_grpo_jax.models import lora, registry, wan
from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.weights import conversion, tables

VAE = WanVaeConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.1, -0.2),
    latents_std=(1.5, 0.7),
)
MODELS = {
    "transformer": (lambda: make_oracle(TINY), TINY, WanTransformer3DModel),
    "vae": (lambda: wan_vae_oracle.reference(VAE), VAE, AutoencoderKLWan),
}


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_bit_for_bit(name, tmp_path):
    """diffusers -> the original layout -> orbax -> diffusers."""
    build, config, model_class = MODELS[name]
    model = build()
    model.save_pretrained(tmp_path / "diffusers")
    assert weights.load_config(tmp_path / "diffusers").to_json() == config.to_json()
    way = ("diffusers", "original", "orbax", "diffusers")
    for step, (src, dst) in enumerate(itertools.pairwise(way)):
        source = tmp_path / ("diffusers" if step == 0 else str(step))
        told = conversion.convert(
            conversion.Job(source, src, tmp_path / str(step + 1), dst, max_shard_size="10GB")
        )
        assert told.startswith(f"{'VAE' if name == 'vae' else 'transformer'}, {dst}")
    state = model_class.from_pretrained(tmp_path / "3").state_dict()
    want = model.state_dict()
    assert state.keys() == want.keys()
    for tensor, value in want.items():
        np.testing.assert_array_equal(state[tensor], value)
    loaded = [weights.load(tmp_path / folder, config) for folder in ("diffusers", "1", "2")]
    for other in loaded[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, loaded[0])


def test_models_are_told_apart(tmp_path):
    """By their tensors, before any is read."""
    make_oracle(TINY).save_pretrained(tmp_path / "wan")
    wide = dataclasses.replace(TINY, ffn_dim=44)
    with pytest.raises(ValueError, match="instead of"):
        weights.load(tmp_path / "wan", wide)
    vae = registry.named("AutoencoderKLHunyuanVideo15").Config()
    with pytest.raises(ValueError, match=r"weights of a Wan 2.1 DiT, .* a HunyuanVideo-1.5 VAE"):
        weights.load(tmp_path / "wan", vae)
    (tmp_path / "wan" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        conversion.convert(conversion.Job(tmp_path / "wan", "diffusers", tmp_path / "o", "orbax"))
    with pytest.raises(ValueError, match=r"layout='tencent': must be one of \['diffusers', 'orig"):
        weights.save({}, tmp_path / "o", "tencent", config=TINY)


def test_the_vae_without_config_is_the_released_one(tmp_path):
    """Shapes alone: 16 channels are taken for the released ones, other numbers are refused."""
    for config in (WanVaeConfig(), VAE):
        for layout in ("diffusers", "original"):
            rows, shapes = tables.key_table(config, layout)
            found = {n: row.shape_there(shapes[row.ours]) for row in rows for n in row.names()}
            if config == VAE:
                with pytest.raises(ValueError, match="latents_mean is not in the tensors"):
                    weights.store.facts.infer_config(layout, found)
            else:
                assert weights.store.facts.infer_config(layout, found) == config


def test_adapters_go_to_diffusers_and_come_back(tmp_path):
    model = make_oracle(TINY)
    model.save_pretrained(tmp_path / "base")
    params = weights.load(tmp_path / "base", TINY)
    chosen = lora.LoraConfig(2, 3.0, ("query", "mlp/in", "time_embed/out"))
    rng = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32),
        lora.abstract_adapters(params, chosen, wan),
    )
    inputs = make_inputs(TINY, (2, 4, 6), (3, 7))
    ours = jax.jit(wan.velocity, static_argnums=4)(params, *inputs, TINY, adapters, chosen.scale)
    assert np.abs(np.asarray(ours) - oracle_output(model, *inputs)).max() > 1e-2

    weights.save_adapters(adapters, tmp_path / "ours", chosen, TINY)
    model.load_lora_adapter(
        tmp_path / "ours", prefix="transformer", use_safetensors=True, adapter_name="default"
    )
    np.testing.assert_allclose(ours, oracle_output(model, *inputs), rtol=0, atol=2e-5)

    model.save_lora_adapter(tmp_path / "theirs")
    back, found = weights.load_adapters(tmp_path / "theirs", TINY)
    assert found.scale == pytest.approx(1.5)
    assert set(found.targets) == set(chosen.targets)
    want, back = (traverse_util.flatten_dict(tree) for tree in (adapters, back))
    assert back.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(back[path], value)
