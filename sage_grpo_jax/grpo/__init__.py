"""The GRPO objective: advantages, equalizer, losses, trust region. Pure math."""
