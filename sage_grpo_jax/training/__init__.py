"""One reinforcement-learning step, and the loop around it."""
