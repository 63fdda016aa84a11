"""Configs of the Wan 2.1 VAE read off the tensors of diffusers' models."""

import pytest
import wan_vae_oracle as oracle

from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.weights.tables import wan_vae_keys

UNREADABLE = (KeyError, IndexError, ValueError, ZeroDivisionError)
UNITS = {"z_dim": 2, "latents_mean": (0.0, 0.0), "latents_std": (1.0, 1.0)}
CONFIGS = {
    "as_released": WanVaeConfig(base_dim=4, **UNITS),
    "time_first": WanVaeConfig(
        **UNITS,
        base_dim=5,
        decoder_base_dim=6,
        dim_mult=(3, 1),
        num_res_blocks=1,
        temperal_downsample=(True,),
        in_channels=1,
        out_channels=4,
    ),
    "one_level": WanVaeConfig(
        **UNITS, base_dim=4, dim_mult=(2,), num_res_blocks=3, temperal_downsample=()
    ),
}
ROWS = {
    wan_vae_keys.DIFFUSERS: wan_vae_keys.diffusers_rows,
    wan_vae_keys.ORIGINAL: wan_vae_keys.original_rows,
}


def _tensors(config, names):
    shapes = oracle.shapes(config)
    return {row.theirs: row.shape_there(shapes[row.ours]) for row in ROWS[names](config)}


def _read(names, tensors):
    facts = {}
    for field, (_, read, _) in wan_vae_keys.facts(names, tensors).items():
        try:
            facts[field] = read()
        except UNREADABLE:
            continue
    return facts


@pytest.mark.parametrize("names", ROWS, ids=["diffusers", "original"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_tensors_show_all_fields(name, names):
    config = CONFIGS[name]
    assert WanVaeConfig(**UNITS | _read(names, _tensors(config, names))) == config


@pytest.mark.parametrize("names", ROWS, ids=["diffusers", "original"])
def test_a_missing_or_scalar_tensor_never_looks_like_another_model(names):
    config = CONFIGS["as_released"]
    tensors = _tensors(config, names)
    unread = 0
    for name in tensors:
        for changed in ({k: v for k, v in tensors.items() if k != name}, tensors | {name: ()}):
            facts = _read(names, changed)
            unread += len(facts) < len(wan_vae_keys.facts(names, changed))
            assert facts == {field: getattr(config, field) for field in facts}, name
    assert unread > 0


def test_the_tensors_that_show_fields_are_those_of_the_layout():
    for names in ROWS:
        tensors = _tensors(CONFIGS["time_first"], names)
        for shown, *_ in wan_vae_keys.facts(names, tensors).values():
            before, _, after = shown.partition("*")
            assert any(name.startswith(before) and name.endswith(after) for name in tensors)
