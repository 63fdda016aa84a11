"""The presets, field by field, against what their authors' code and papers say."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sage_grpo_jax.config import builder, methods, schema, step_plan
from sage_grpo_jax.experiments import sweeps
from sage_grpo_jax.grpo import trust_region

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = ("moving_shapes.py", "hunyuan_video_15.py")
MATCHED = {"flow_grpo_matched": "flow", "dance_grpo_matched": "dance", "cps_matched": "cps"}


def make(method: str, file: str = "moving_shapes.py", **overrides) -> schema.Config:
    plan = sweeps.load_module(ROOT / "configs" / file).get_config(f"method={method}")
    plan.update_from_flattened_dict(overrides)
    return builder.from_config_dict(plan)


def get(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


# The settings of the authors, by their own names; then what they are here.
FLOW_GRPO = {  # yifan123/flow_grpo: config/base.py, config/grpo.py:general_ocr_sd3, train_sd3.py
    "sample.noise_level": (0.7, "rollout.eta"),
    "sample.global_std": ("global", "advantage.std"),
    "stat_tracking.py, + 1e-4": (1e-4, "advantage.epsilon"),
    "train.adv_clip_max": (5.0, "advantage.clip"),
    "train.clip_range": (1e-4, "loss.clip_range"),
    "train.timestep_fraction": (0.99, "rollout.trained_fraction"),
    "range(num_train_timesteps)": ("first", "rollout.trained_choice"),
    "noise at every step": ("stochastic", "rollout.last_step"),
    "train.beta": (0.04, "trust_region.fixed_weight"),
    "disable_adapter()": ("fixed", "trust_region.kind"),
    "2 * std_dev_t ** 2": ("step_length", "trust_region.kl_time_weight"),
    "noise_pred_uncond.detach()": ("condition", "loss.guidance_gradient"),
    "num_batches_per_epoch // 2": (2, "loss.updates_per_rollout"),
    "samples_batched": (True, "loss.split_updates"),
    "EMAModuleWrapper decay": (0.9, "ema.decay"),
    "update_step_interval": (8, "ema.every"),
    "eval: copy_ema_to": ("ema", "eval.weights"),
    "train.adam_beta1": (0.9, "optimizer.b1"),
    "train.adam_beta2": (0.999, "optimizer.b2"),
    "train.adam_weight_decay": (1e-4, "optimizer.weight_decay"),
    "train.max_grad_norm": (1.0, "optimizer.grad_clip"),
    "AdamW": ("adamw", "optimizer.name"),
    "randn_tensor per image": (False, "rollout.same_initial_noise"),
    "no weights per step": (False, "loss.equalizer"),
}
DANCE_GRPO = {  # XueZeyue/DanceGRPO: finetune_hunyuan_grpo.sh, fastvideo/train_grpo_hunyuan.py
    "--eta": (0.25, "rollout.eta"),
    "pred_original is decoded, [:, :-1]": ("deterministic", "rollout.last_step"),
    "--use_same_noise": (True, "rollout.same_initial_noise"),
    "--timestep_fraction": (0.6, "rollout.trained_fraction"),
    "randperm of the steps": ("random", "rollout.trained_choice"),
    "group_rewards.std()": ("group_unbiased", "advantage.std"),
    "vq_coef, mq_coef: advantages of each": ("per_reward", "advantage.combine"),
    "+ 1e-8": (1e-8, "advantage.epsilon"),
    "adv_clip_max": (5.0, "advantage.clip"),
    "clip_range": (1e-4, "loss.clip_range"),
    "--bestofn 8 / --gradient_accumulation_steps 4": (2, "loss.updates_per_rollout"),
    "optimizer.step() in the loop over samples": (True, "loss.split_updates"),
    "no reference": ("none", "trust_region.kind"),
    "--max_grad_norm": (1.0, "optimizer.grad_clip"),
    "--weight_decay": (1e-4, "optimizer.weight_decay"),
    "betas[0]": (0.9, "optimizer.b1"),
    "betas[1]": (0.999, "optimizer.b2"),
    "AdamW": ("adamw", "optimizer.name"),
    "no average": (0.0, "ema.decay"),
    "no weights per step": (False, "loss.equalizer"),
    "one transformer call": ("both", "loss.guidance_gradient"),
}
CPS = {  # IamCreateAI/FlowCPS: config/grpo.py:pickscore_flux, sd3_sde_with_logprob.py
    "sample.noise_level": (0.9, "rollout.eta"),
    "-(prev_sample - mean) ** 2": ("squared", "loss.log_prob"),
    "no weights per step": (False, "loss.equalizer"),
    "sample.global_std": ("global", "advantage.std"),
    "+ 1e-4": (1e-4, "advantage.epsilon"),
    "train.adv_clip_max": (5.0, "advantage.clip"),
    "train.clip_range": (1e-4, "loss.clip_range"),
    "train.beta": ("none", "trust_region.kind"),
    "sample.same_latent": (False, "rollout.same_initial_noise"),
    "num_batches_per_epoch // 2": (2, "loss.updates_per_rollout"),
    "samples_batched": (True, "loss.split_updates"),
    "EMAModuleWrapper decay": (0.9, "ema.decay"),
    "update_step_interval": (8, "ema.every"),
    "eval: copy_ema_to": ("ema", "eval.weights"),
    "train.adam_weight_decay": (1e-4, "optimizer.weight_decay"),
    "train.max_grad_norm": (1.0, "optimizer.grad_clip"),
}
NFT = {  # NVlabs/DiffusionNFT: config/base.py, config/nft.py:sd3_pickscore, train_nft_sd3.py
    "sample.deterministic": ("ode", "rollout.sde"),
    "deterministic, yet samples differ": (False, "rollout.same_initial_noise"),
    "sample.guidance_scale": (1.0, "rollout.guidance"),
    "train.timestep_fraction": (0.99, "rollout.trained_fraction"),
    "perms_time": ("random", "rollout.trained_choice"),
    "beta": (1.0, "nft.beta"),
    "weight_factor": (True, "nft.adaptive"),
    "decay_type 1: flat": (0, "nft.decay_start"),
    "decay_type 1: uprate": (0.001, "nft.decay_rate"),
    "decay_type 1: uphold": (0.5, "nft.decay_limit"),
    "gradient_step_per_epoch": (1, "loss.updates_per_rollout"),
    "train.beta": (1e-4, "trust_region.final_weight"),
    "disable_adapter()": ("fixed", "trust_region.kind"),
    "sample.global_std": ("global", "advantage.std"),
    "+ 1e-4": (1e-4, "advantage.epsilon"),
    "train.adv_clip_max": (5.0, "advantage.clip"),
    "EMAModuleWrapper decay": (0.9, "ema.decay"),
    "update_step_interval": (1, "ema.every"),
    "train.adam_weight_decay": (1e-4, "optimizer.weight_decay"),
    "train.max_grad_norm": (1.0, "optimizer.grad_clip"),
}
OFFICIAL = {  # Tencent-Hunyuan/SAGE-GRPO: post_train.py, hyvideo/utils/grpo_utils.py
    "sde_type sage_grpo": ("precise", "rollout.sde"),
    "determistic False": ("stochastic", "rollout.last_step"),
    "timestep_fraction": (1.0, "rollout.trained_fraction"),
    "clip_range": (1e-4, "loss.clip_range"),
    "adv_clip_max": (5.0, "advantage.clip"),
    "std clamped at 1e-6": (1e-6, "advantage.std_floor"),
    "no epsilon": (0.0, "advantage.epsilon"),
    "torch.median": ("lower", "loss.median"),
    "use_grad_balancing": (True, "loss.equalizer"),
    "reward_weights VQ": (0.5, "rewards.weights.VQ"),
    "reward_weights MQ": (0.5, "rewards.weights.MQ"),
    "reward_weights TA": (1.0, "rewards.weights.TA"),
    "use_moving_KL, use_dual_kl": ("dual", "trust_region.kind"),
    "update_ref_model_step": (10, "trust_region.anchor_every"),
    "dual_kl_moving_weight": (1.0, "trust_region.anchor_weight"),
    "dual_kl_step_weight": (0.1, "trust_region.previous_weight"),
    "old_logp - new_logp": ("log_ratio", "trust_region.previous_estimator"),
    "kl_min_coef": (1e-7, "trust_region.min_weight"),
    "kl_weight": (1e-5, "trust_region.max_weight"),
    "use_muon": ("muon", "optimizer.name"),
    "max_grad_norm": (1.0, "optimizer.grad_clip"),
    "weight_decay": (0.01, "optimizer.weight_decay"),
    "one optimizer step": (1, "loss.updates_per_rollout"),
}
AUTHORS = {
    "flow_grpo": ({"rollout.sde": "flow", "loss.log_prob": "gaussian"}, FLOW_GRPO),
    "dance_grpo": ({"rollout.sde": "dance", "loss.log_prob": "gaussian"}, DANCE_GRPO),
    "cps": ({"rollout.sde": "cps"}, CPS),
    "diffusion_nft": ({"loss.objective": "nft"}, NFT),
    "sage_official": ({"loss.objective": "ppo", "loss.step_reduction": "mean"}, OFFICIAL),
}


@pytest.mark.parametrize("file", RECIPES)
@pytest.mark.parametrize("method", AUTHORS)
def test_presets_are_their_authors_settings(method, file):
    config = make(method, file)
    also, settings = AUTHORS[method]
    for path, value in also.items():
        assert get(config, path) == value, path
    for theirs, (value, path) in settings.items():
        assert get(config, path) == value, f"{theirs} is {path}"


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_field_of_a_preset_has_been_compared(method):
    """A field that a preset sets and no source was looked up for would go unnoticed."""
    if method in MATCHED or method in ("sage", "sage_paper"):
        return
    also, settings = AUTHORS[method]
    compared = {path for _, path in settings.values()} | set(also)
    # The same in all that take ratios of log-probabilities, or tested by what it does below.
    common = {"loss.objective", "loss.step_reduction", "loss.log_prob", "loss.equalizer"}
    common |= {"optimizer.name", "optimizer.b1", "optimizer.b2", "optimizer.momentum"}
    common |= {"eval.weights", "trust_region.fixed_weight"}
    left = {name for name in methods.METHODS[method] if name not in compared | common}
    if method == "sage_official":
        left = {name for name in left if not name.startswith("trust_region.")}
    assert not left


@pytest.mark.parametrize("file", RECIPES)
@pytest.mark.parametrize("method", MATCHED)
def test_matched_variants_differ_from_sage_in_the_sampler_alone(method, file):
    config, sage = make(method, file), make("sage", file)
    assert (config.rollout.sde, sage.rollout.sde) == (MATCHED[method], "precise")
    same = dataclasses.replace(
        config,
        method="sage",
        rollout=dataclasses.replace(config.rollout, sde="precise"),
    )
    assert same == sage


def weights_over_updates(region: trust_region.TrustRegionConfig, kls) -> list[float]:
    """λ before each update and after the last."""
    transform, params = trust_region.trust_region(region), {"x": jnp.zeros(1)}
    state = transform.init(params)
    update = jax.jit(lambda state, kl: transform.update(params, state, params, kl=kl)[1])
    weights = [float(state.weight)]
    for kl in kls:
        state = update(state, kl)
        weights.append(float(state.weight))
    return weights


def test_a_fixed_anchor_has_the_same_weight_in_every_method():
    """Whatever the preset does with the weight of other kinds."""
    kls = np.float32([0, 1e-9, 5.0, 5.0, 1e-3] * 8)
    found = {}
    for method in methods.METHODS:
        if method == "diffusion_nft":  # its distance is one of velocities, no KL
            continue
        for kind in ("fixed", "fixed_stepwise"):
            region = make(method, **{"trust_region.kind": kind}).trust_region
            if region.penalises_motion:
                region = dataclasses.replace(region, previous_estimator="closed_form")
            found[method, kind] = tuple(weights_over_updates(region, kls))
    assert set(found.values()) == {(np.float32(0.04),) * 41}
    assert make("sage", **{"trust_region.kind": "none"}).trust_region.kind == "none"


def test_moving_anchors_have_the_same_weight_in_all_methods_that_say_nothing_of_it():
    shared = [m for m in methods.METHODS if m not in ("sage_official", "sage_paper")]
    kls = np.float32([1e-5] * 25 + [1.0] * 10 + [0.0] * 10)
    traces = {
        tuple(weights_over_updates(make(m, **{"trust_region.kind": "moving"}).trust_region, kls))
        for m in shared
    }
    assert len(traces) == 1


def controller(kls, micro_steps=40):
    """The authors' AdaptiveKLController, moved at every micro-step of every update."""
    target, lowest, highest, weight, history, count = 1e-5, 1e-7, 1e-5, 1e-7, [], 0
    weights = [weight]
    for kl in kls:
        for _ in range(micro_steps):
            count += 1
            history = [*history, kl][-100:]
            if count < 100:
                weight = lowest + (target - lowest) * count / 100
                continue
            mean = sum(history[-10:]) / 10
            weight *= 0.9 if mean > 1.5 * target else 1.1 if mean < 0.5 * target else 1.0
            weight = min(max(weight, lowest), highest)
        weights.append(weight)
    return weights


def test_the_official_controller_after_whole_updates():
    """100 and 10 of its micro-steps are 2.5 and 0.25 updates of 40."""
    kls = [0.0, 0.0, 0.0, 1e-5, 1e-5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1e-5]
    region = make("sage_official").trust_region
    ours, theirs = weights_over_updates(region, kls), controller(kls)
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=1e-5)  # the warm-up: 0, 0.4, 0.8
    np.testing.assert_allclose(ours[3:6], theirs[3:6], rtol=1e-5)  # at the target
    # 0.9 at forty micro-steps is 0.0148: the range of 100 is crossed in two updates.
    np.testing.assert_allclose(ours[7:9], theirs[7:9], rtol=1e-5)
    np.testing.assert_allclose(ours[10:], theirs[10:], rtol=1e-5)
    np.testing.assert_allclose(ours[6], theirs[6], rtol=0.1)
    # What the paper prints counts updates.
    paper = weights_over_updates(make("sage_paper").trust_region, [1e-5] * 100)
    assert paper[50] == pytest.approx(5.05e-6, rel=1e-4)


def test_full_size_runs_take_setting_b():
    for method, wanted in (("sage", (0.5, 0.5, 1.0)), ("dance_grpo", (0.5, 0.5, 1.0))):
        weights = make(method, "hunyuan_video_15.py").rewards.weights
        assert wanted == (weights.VQ, weights.MQ, weights.TA)


def test_rows_of_table_2_differ_in_what_they_name():
    module = sweeps.load_module(ROOT / "configs" / "sweeps" / "table2.py")
    rows = []
    module.sweep(rows.append)
    base = module.get_config()
    by_row = {}
    for row in rows:
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict(row)
        made = builder.from_config_dict(config)
        by_row.setdefault((made.rollout.sde, made.trust_region.kind), []).append(made)
    assert set(by_row) == {
        ("dance", "none"), ("dance", "fixed"), ("flow", "none"), ("flow", "fixed"),
        ("cps", "none"), ("cps", "fixed"),
        ("precise", "none"), ("precise", "fixed"), ("precise", "dual"),
    }  # fmt: skip
    for made in by_row.values():
        seen = {(m.seed, m.rewards.weights.VQ, m.rewards.weights.TA) for m in made}
        assert seen == {(s, vq, 1.0) for s in (0, 1, 2) for vq in (0.5, 1.0)}
    # One penalty is the same whatever the sampler, and everything else is the same in all rows.
    for kind in ("none", "fixed", "dual"):
        same = {m.trust_region for (_, k), made in by_row.items() if k == kind for m in made}
        assert len(same) == 1
    fixed = by_row["dance", "fixed"][0].trust_region
    assert (fixed.initial_weight, fixed.final_weight, fixed.feedback) == (0.04, 0.04, "none")
    # Every number of λ is named in every row, not left to a default.
    names = ("fixed", "initial", "final", "min", "max")
    for row in rows:
        assert {f"trust_region.{name}_weight" for name in names} <= set(row)

    def rest(made):
        rollout = dataclasses.replace(made.rollout, sde="precise")
        rewards = dataclasses.replace(made.rewards, weights=None)
        return dataclasses.replace(
            made, seed=0, rollout=rollout, rewards=rewards, trust_region=None
        )

    assert len({rest(made) for rows_of in by_row.values() for made in rows_of}) == 1


def test_the_table_in_the_docs_is_what_the_presets_set():
    """docs/methods.md, "Presets": a row per field, a column per preset."""
    text = (ROOT / "docs" / "methods.md").read_text()
    section = text.partition("## Presets")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [re.findall(r"`(\w+)`", cell) for cell in rows[0]]
    shown = {}
    for row in rows[2:]:
        for path in re.findall(r"`([\w.]+)`", row[0]):
            for names, cell in zip(columns[1:], row[1:], strict=True):
                for name in names:
                    shown[name, path] = cell
    for method in ("sage", *AUTHORS, "sage_paper"):
        for path, value in methods.METHODS[method].items():
            cell = shown[method, path]
            found = cell.split()[0].rstrip(",")
            if isinstance(value, bool):
                assert found == ("yes" if value else "no"), (method, path)
            elif isinstance(value, str):
                assert found == value, (method, path)
            else:
                assert float(found) == pytest.approx(value, rel=2e-3), (method, path)
    for (method, path), cell in shown.items():
        assert (path in methods.METHODS[method]) == (cell != "–"), (method, path, cell)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("file", RECIPES)
def test_every_preset_makes_a_run_that_can_be_trained(method, file):
    config = make(method, file)
    plan = step_plan.plan_steps(config)
    assert plan.positions >= 1
    pieces, rest = divmod(config.batch_size, config.loss.micro_batch)
    assert rest == 0
    if config.loss.split_updates:
        assert pieces % config.loss.updates_per_rollout == 0
    assert min(sweeps.forward_passes(config)) > 0
