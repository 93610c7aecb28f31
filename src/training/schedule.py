"""The learning rate as a pure function of the step."""

import math

from src.utils.config import Config


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    Warm-up rises linearly from lr / warm-up steps to lr (Goyal et al., arXiv:1706.02677, section 2.2). After it, in
    epochs t from the end of the warm-up and T = T_max - warmup_epochs:

    - cosine_annealing: eta_min + (lr - eta_min) (1 + cos(pi t / T)) / 2, and eta_min after T
      (Loshchilov and Hutter, arXiv:1608.03983, without restarts);
    - step: lr * lr_gamma ** (number of lr_epochs passed, counted from the start of the training);
    - exponential: lr * lr_gamma ** t.
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.lr_scheduler == "step":
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in config.lr_epochs)
        return config.lr * config.lr_gamma ** passed
    epochs = (step - warmup_steps) / steps_per_epoch
    if config.lr_scheduler == "exponential":
        return config.lr * config.lr_gamma ** epochs
    length = max((config.T_max or config.max_epoch) - config.warmup_epochs, 1 / steps_per_epoch)
    return config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * min(epochs / length, 1))) / 2
