"""Flow-matching samplers: schedules, stochastic transitions, rollouts. Pure math."""
