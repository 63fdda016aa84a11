"""The kinds of text encoders that `encode_prompts` knows, and which of them a folder holds."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sage_grpo_jax.common import checked_json
from sage_grpo_jax.text_encoders import qwen, umt5
from sage_grpo_jax.text_encoders.kind import Kind

KINDS: tuple[Kind, ...] = (qwen.KIND, umt5.KIND)


def choose(folder: pathlib.Path) -> Kind:
    """The kind of a model folder, by the `model_type` of its config.json.

    A config without `model_type` is known by the first of its `architectures`.

    Raises:
      ValueError: no config that can be read, or that of another model.
    """
    file = folder / "config.json"
    config = checked_json.load(file)
    if config.get("model_type") is not None:
        kinds = {name: kind for kind in KINDS for name in kind.model_types}
        return _look_up(kinds, config["model_type"], f"{file}: model_type")

    kinds = {name: kind for kind in KINDS for name in kind.architectures}
    listed = config.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else listed
    return _look_up(kinds, first, f"{file}: no model_type, and the first of architectures")


def _look_up(kinds: Mapping[str, Kind], name: Any, field: str) -> Kind:
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{field} is {checked_json.shown(name)}; allowed: {', '.join(kinds)}")
    return kinds[name]


def check_companions(kind: Kind, given: Sequence[str]) -> None:
    """Refuses flags that mean nothing beside a kind.

    Raises:
      ValueError: naming all of them, and the kinds that they go with.
    """
    foreign = [flag for flag in given if flag not in kind.companions]
    if foreign:
        others = [other.name for other in KINDS if set(foreign) <= set(other.companions)]
        raise ValueError(
            f"{', '.join(foreign)}: not with a text_encoder of the kind {kind.name}; allowed with: "
            f"{', '.join(others)}"
        )
