"""Key tables of the Wan 2.1 VAE against diffusers' tensors and its conversion of the originals.

And its configs, read off the tensors of diffusers' models.
"""

import numpy as np
import pytest
import torch
import wan_vae_oracle as oracle
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from sage_grpo_jax.models.wan_vae import WanVaeConfig
from sage_grpo_jax.weights.tables import key_table, wan_vae_keys


def _config(**fields) -> WanVaeConfig:
    plain = {"base_dim": 4, "z_dim": 2, "latents_mean": (0.0, 0.0), "latents_std": (1.0, 1.0)}
    return WanVaeConfig(**(plain | fields))


CONFIGS = {
    "as_released": _config(),
    "time_first": _config(
        dim_mult=(3, 1), num_res_blocks=1, temperal_downsample=(True,), decoder_base_dim=6
    ),
    "one_level": _config(dim_mult=(2,), num_res_blocks=3, temperal_downsample=()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_tensors_come_back_bit_for_bit(name):
    config = CONFIGS[name]
    want = oracle.reference(config).state_dict()
    got = oracle.to_theirs(oracle.to_ours(config, want), wan_vae_keys.diffusers_rows(config))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_fused_projections_are_query_key_and_value_in_this_order():
    config = CONFIGS["one_level"]
    tensors = oracle.reference(config).state_dict()
    attention = oracle.to_ours(config, tensors)["decoder"]["mid"]["attention"]
    fused = tensors["decoder.mid_block.attentions.0.to_qkv.weight"][:, :, 0, 0].numpy()
    for part, want in zip(("query", "key", "value"), np.split(fused, 3), strict=True):
        np.testing.assert_array_equal(attention[part]["kernel"], want.T)


def test_original_tensors_are_those_that_diffusers_converts():
    # diffusers converts originals with the released depth only.
    config = CONFIGS["as_released"]
    want, rows = oracle.reference(config).state_dict(), wan_vae_keys.original_rows(config)
    original = oracle.to_theirs(oracle.to_ours(config, want), rows)
    assert {"conv1.weight", "conv2.bias", "encoder.conv1.weight", "decoder.head.2.bias",
            "encoder.downsamples.5.time_conv.weight"} <= original.keys()  # fmt: skip
    converted = convert_wan_vae_to_diffusers(dict(original))
    assert converted.keys() == want.keys()
    assert all(torch.equal(converted[name], want[name]) for name in want)
    back = oracle.to_theirs(oracle.to_ours(config, original, rows),
                            wan_vae_keys.diffusers_rows(config))  # fmt: skip
    assert all(torch.equal(back[name], want[name]) for name in want)


def test_the_released_model_has_a_row_for_every_tensor_and_parameter():
    config = WanVaeConfig()
    with torch.device("meta"):
        tensors = {name: tuple(t.shape) for name, t in AutoencoderKLWan().state_dict().items()}
    rows, shapes = wan_vae_keys.diffusers_rows(config), oracle.shapes(config)
    key_table.check_parameters(rows, shapes)
    key_table.check_tensors(rows, shapes, tensors)
    assert len(tensors) == 194
    assert len({row.theirs for row in wan_vae_keys.original_rows(config)}) == len(tensors)


# The config


UNREADABLE = (KeyError, IndexError, ValueError, ZeroDivisionError)
UNITS = {"z_dim": 2, "latents_mean": (0.0, 0.0), "latents_std": (1.0, 1.0)}
SHOWN = {
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
@pytest.mark.parametrize("name", SHOWN)
def test_all_tensors_show_all_fields(name, names):
    config = SHOWN[name]
    assert WanVaeConfig(**UNITS | _read(names, _tensors(config, names))) == config


@pytest.mark.parametrize("names", ROWS, ids=["diffusers", "original"])
def test_a_missing_or_scalar_tensor_never_looks_like_another_model(names):
    config = SHOWN["as_released"]
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
        tensors = _tensors(SHOWN["time_first"], names)
        for shown, *_ in wan_vae_keys.facts(names, tensors).values():
            before, _, after = shown.partition("*")
            assert any(name.startswith(before) and name.endswith(after) for name in tensors)
