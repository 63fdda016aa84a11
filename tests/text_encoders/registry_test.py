"""Which kind of text encoder a folder holds, by its own config."""

import json

import pytest
import tiny_models

from sage_grpo_jax.text_encoders import qwen, registry, umt5


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "qwen2_5_vl"}, qwen.KIND),
        ({"model_type": "qwen2_5_vl_text", "architectures": ["Other"]}, qwen.KIND),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, qwen.KIND),
        ({"model_type": "umt5"}, umt5.KIND),
        ({"model_type": None, "architectures": ["UMT5EncoderModel"]}, umt5.KIND),
    ],
)
def test_the_config_decides(tmp_path, config, kind):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert registry.choose(tmp_path) is kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # What a config says of its own comes first.
        ('{"model_type": "t5", "architectures": ["UMT5EncoderModel"]}',
         "model_type is 't5'; allowed: qwen2_5_vl, qwen2_5_vl_text, umt5$"),
        ('{"model_type": ["umt5"]}', r"model_type is \['umt5'\]; allowed"),
        ('{"architectures": ["T5EncoderModel", "UMT5EncoderModel"]}',
         "no model_type, and the first of architectures is 'T5EncoderModel'; allowed: Qwen2_5_VL"),
        ('{"architectures": []}', r"architectures is \[\]; allowed"),
        ("{}", "architectures is None; allowed"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)  # fmt: skip
def test_other_models_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: .*{message}"):
        registry.choose(tmp_path)


def test_saved_models_are_known(tmp_path):
    """What transformers writes into the config of a text encoder, and of the whole model."""
    tiny_models.build_wan_pipeline(tmp_path)
    assert registry.choose(tmp_path / "text_encoder") is umt5.KIND
    tiny_models.save_whole_umt5(tmp_path / "whole", tmp_path / "text_encoder")
    assert registry.choose(tmp_path / "whole") is umt5.KIND


def test_no_name_has_two_kinds():
    for field in ("model_types", "architectures"):
        names = [name for kind in registry.KINDS for name in getattr(kind, field)]
        assert len(names) == len(set(names)) >= len(registry.KINDS)
    assert len({kind.name for kind in registry.KINDS}) == len(registry.KINDS)


def test_companions():
    flags = ["byt5", "image_encoder", "vae", "height", "width"]
    registry.check_companions(qwen.KIND, flags)
    registry.check_companions(umt5.KIND, [])
    with pytest.raises(
        ValueError, match=r"^byt5, vae: not with .* umt5; allowed with: qwen2_5_vl$"
    ):
        registry.check_companions(umt5.KIND, ["byt5", "vae"])
