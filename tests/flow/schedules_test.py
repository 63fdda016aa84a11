import diffusers
import jax
import numpy as np
import pytest

from sage_grpo_jax.flow import schedules


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 5.0), (20, 5.0), (50, 7.0), (1000, 0.1)])
def test_matches_diffusers_flow_match_scheduler(num_steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    # The HunyuanVideo-1.5 pipeline hands these unshifted values to its scheduler.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, num_steps + 1)[:-1])
    schedule = schedules.make_schedule(num_steps, shift)
    # diffusers computes in float32 throughout.
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)


def test_shape_ends_and_order_over_the_whole_range():
    for shift in (0.1, 1.0, 5.0, 20.0):
        for num_steps in (1, 2, 20, 333, 1000):
            sigmas, timesteps = schedules.host_schedule(num_steps, shift)
            assert sigmas.dtype == timesteps.dtype == np.float32
            assert sigmas.shape == (num_steps + 1,)
            assert timesteps.shape == (num_steps,)
            assert sigmas[0] == 1.0
            assert sigmas[-1] == 0.0
            assert timesteps[0] == 1000.0
            assert np.all(np.diff(sigmas) < 0)


def test_is_concrete_and_indexable_inside_jit():
    @jax.jit
    def pick(t):
        schedule = schedules.make_schedule(4, 1.0)
        assert np.asarray(schedule.sigmas).shape == (5,)
        return schedule.sigmas[t], schedule.timesteps[t]

    sigma, timestep = pick(1)
    assert (sigma, timestep) == (0.75, 750.0)


def test_a_step_ends_where_the_next_one_starts():
    schedule = schedules.make_schedule(5, 3.0)
    starts = schedule.timesteps[jax.numpy.array([[0, 3], [4, 1]])]
    ends = schedules.next_timestep(schedule, starts)
    wanted = 1000 * np.asarray(schedule.sigmas)[np.array([[1, 4], [5, 2]])]
    np.testing.assert_allclose(ends, wanted, rtol=1e-6)
    assert ends[1, 0] == 0
    assert np.isnan(schedules.next_timestep(schedule, starts[0, 1] + 1))


@pytest.mark.parametrize(
    ("num_steps", "shift", "message"),
    [
        (0, 5.0, "num_steps=0"),
        (-3, 5.0, "num_steps=-3"),
        (2.5, 5.0, "num_steps=2.5"),
        (20, 0.0, "shift=0.0"),
        (20, -1.0, "shift=-1.0"),
        (20, float("nan"), "shift=nan"),
    ],
)
def test_bad_input(num_steps, shift, message):
    with pytest.raises(ValueError, match=message):
        schedules.make_schedule(num_steps, shift)
