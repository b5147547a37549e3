"""Learning rate as a pure function of the step."""

import math

from ..config.schema import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (0 is the first).

    Linear warmup, then `constant`, `cosine` (half a cosine to lr * min_lr_ratio at the last step)
    or `wsd` (stable, then linear decay over the last `decay_fraction` of the steps).

    Source:
        cosine: Loshchilov and Hutter, SGDR, eq. 5 without restarts; wsd: MiniCPM, sec. 4.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps + 1) / max(1, config.steps - config.warmup_steps)
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if config.schedule == "wsd":
        decay_steps = max(1, round(config.steps * config.decay_fraction))
        left = max(0, config.steps - step - 1) / decay_steps
        return floor + (config.lr - floor) * min(1.0, left)
    return config.lr
