"""What rewards may be called, and what their metrics are called.

A recipe names its rewards (`config.rewards.weights`); each becomes a metric `reward/NAME` in lower
case, next to those that every run has.
"""

import re
from collections.abc import Collection, Iterable

# Metrics `reward/...` of every run, which no reward may be called by.
RESERVED = ("overall", "weighted", "valid_fraction", "group_std")
ERROR_SUFFIX = "_standard_error"  # of an evaluation's means, over the prompts

_PREFIX = "reward/"
# A part of a flag: --config.rewards.weights.NAME=1.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*", re.ASCII)


def metric(name: str) -> str:
    """The metric of a reward: `reward/name`."""
    return f"{_PREFIX}{name.lower()}"


def check(names: Iterable[str]) -> None:
    """Refuses names that a flag or a metric cannot have.

    Raises:
      ValueError: with the name and what is allowed.
    """
    # Metrics are in lower case, so two names could end up as one.
    metrics: dict[str, str] = {}
    for name in names:
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise ValueError(
                f"{name!r} as the name of a reward; allowed: a letter, then letters, digits, _ or -"
            )
        if name.lower() in RESERVED or name.lower().endswith(ERROR_SUFFIX):
            raise ValueError(
                f"{name!r} as the name of a reward; allowed: names other than those of the metrics "
                f"{', '.join(RESERVED)} and *{ERROR_SUFFIX}"
            )
        other = metrics.setdefault(metric(name), name)
        if other != name:
            raise ValueError(
                f"{other!r} and {name!r} as the names of rewards, which share the metric "
                f"{metric(name)}; allowed: names that differ in more than upper and lower case"
            )


def measured(metrics: Collection[str]) -> tuple[str, ...]:
    """The rewards, in lower case, of which there are metrics; in their order.

    Args:
      metrics: names of metrics, without the split of an evaluation in front.
    """
    found = [m.removeprefix(_PREFIX) for m in metrics if m.startswith(_PREFIX)]
    return tuple(n for n in found if n not in RESERVED and not n.endswith(ERROR_SUFFIX))
