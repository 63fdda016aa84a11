"""What rewards may be called, and which metrics are rewards."""

import pytest

from sage_grpo_jax.rewards import names


def test_metrics_are_in_lower_case():
    assert names.metric("VQ") == "reward/vq"
    assert names.metric("CLIP_score-2") == "reward/clip_score-2"


def test_any_word_is_a_name():
    names.check(["VQ", "MQ", "TA", "aesthetic", "hps_v2", "clip-score", "x"])
    names.check([])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["VQ", "a.b"], "'a.b' as the name of a reward; allowed: a letter, then"),
        ([""], "'' as the name"),
        (["2d"], "'2d' as the name"),
        (["größe"], "'größe' as the name"),
        (["a/b"], "'a/b' as the name"),
        (["a b"], "'a b' as the name"),
        ([7], "7 as the name"),
        (["overall"], "'overall' as the name .* valid_fraction, group_std"),
        (["Weighted"], "'Weighted' as the name"),
        (["valid_fraction"], "'valid_fraction' as the name"),
        (["group_std"], "'group_std' as the name"),
        (["vq_standard_error"], "'vq_standard_error' as the name"),
        (["VQ", "TA", "vq"], "'VQ' and 'vq' .* share the metric reward/vq"),
    ],
)
def test_what_a_flag_or_a_metric_cannot_have_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        names.check(given)


def test_rewards_are_found_among_the_metrics():
    metrics = {
        "step": 1,
        "reward/overall": 0.0,
        "reward/weighted": 0.0,
        "reward/zoom": 0.0,
        "reward/zoom_standard_error": 0.0,
        "reward/overall_standard_error": 0.0,
        "reward/aesthetic": 0.0,
        "reward/valid_fraction": 1.0,
        "reward/group_std": 1.0,
        "eval/reward/vq": 1.0,
        "time/reward": 1.0,
    }
    assert names.measured(metrics) == ("zoom", "aesthetic")  # in their order
