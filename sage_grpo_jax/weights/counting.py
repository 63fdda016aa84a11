"""How many layers or parts a checkpoint has, also where some of their tensors are missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from sage_grpo_jax.weights.key_table import Shape


def has_part(names: Sequence[str], tensors: Mapping[str, Shape]) -> bool:
    """Whether a part is there: at least half of its tensors are."""
    return 2 * sum(name.format(i=0) in tensors for name in names) >= len(names)


def count_layers(templates: Sequence[str], tensors: Mapping[str, Shape]) -> int:
    """How many layers are there: at least half of the tensors of {i} = 0, 1, ...

    Raises:
      ValueError: layers between them are not.
    """
    before = templates[0].partition("{i}")[0]
    parts = {template.partition("{i}")[2] for template in templates}
    pattern, found = re.compile(re.escape(before) + r"(\d{1,6})(.*)"), Counter()
    for name in tensors:
        if (match := pattern.fullmatch(name)) and match[2] in parts:
            found[int(match[1])] += 1
    layers = {layer for layer, count in found.items() if 2 * count >= len(parts)}
    if layers != set(range(len(layers))):
        raise ValueError("layers are missing between others")
    return len(layers)
