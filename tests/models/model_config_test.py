"""What all configs share: parsing, writing, complaints."""

import dataclasses
import json

import numpy as np
import pytest

from sage_grpo_jax.models import model_config


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 3
    axes: tuple[int, int] = (1, 2)
    dtype: str = "float32"
    attention: str = "auto"
    remat: bool = True
    unroll: bool = False


def test_round_trip_without_what_says_how_to_run():
    config = Config(width=5, dtype="bfloat16", unroll=True)
    values = json.loads(model_config.to_json(config, "Model"))
    assert values == {"_class_name": "Model", "width": 5, "axes": [1, 2]}
    runtime = {"dtype": "bfloat16", "unroll": True}
    back = model_config.from_values(Config, "Model", values | {"_diffusers_version": "1"}, runtime)
    assert dataclasses.replace(back, axes=tuple(back.axes)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "Other"}, "_class_name=Other: must be Model"),
        ({"_class_name": 3}, "_class_name=3: must be Model"),
        ({"depth": 3}, r"unknown fields \['depth'\]"),
        ({"remat": False}, r"unknown fields \['remat'\]"),
        ({"width": 3.5}, r"width=3\.5: must be an integer"),
    ],
)
def test_files_of_others(values, message):
    with pytest.raises(ValueError, match=message):
        model_config.from_values(Config, "Model", values, {})


def test_runtime_fields():
    model_config.check_runtime(Config())
    with pytest.raises(ValueError, match="dtype=float16: must be one of"):
        model_config.check_runtime(Config(dtype="float16"))
    with pytest.raises(ValueError, match="attention=flash: must be one of"):
        model_config.check_runtime(Config(attention="flash"))


def test_shapes():
    model_config.require_shape("x", np.zeros((2, 3)), (2, None))
    for wrong in ((2,), (2, 4), (None, 3, 1)):
        with pytest.raises(ValueError, match=r"x\.shape=\(2, 3\): must be"):
            model_config.require_shape("x", np.zeros((2, 3)), wrong)


def test_complaints_stay_short():
    with pytest.raises(ValueError, match="field=") as error:
        model_config.require(False, "field", "x" * 10_000, "less")
    assert len(str(error.value)) < 300
    assert str(error.value).endswith(": must be less")
