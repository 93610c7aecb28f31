"""The learning rate as a pure function of the step."""

import math

from src.utils.config import Config


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Learning rate of optimizer step ``step``, counted from 0.

    Warm-up rises linearly from lr / warm-up steps to lr (Goyal et al., arXiv:1706.02677, section 2.2). After it, in
    epochs t from the start of the training, whole ones with lr_interval=epoch:

    - cosine_annealing: eta_min + (lr - eta_min) (1 + cos(pi t / T_max)) / 2, and eta_min from T_max on
      (Loshchilov and Hutter, arXiv:1608.03983, without restarts);
    - step, and exponential, the model zoo's word for it: lr * lr_gamma ** (number of lr_epochs passed);
    - exponential_decay: lr * lr_gamma ** (t - warmup_epochs).
    """
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.lr_scheduler in ("step", "exponential"):
        passed = sum(step >= round(epoch * steps_per_epoch) for epoch in config.lr_epochs)
        return config.lr * config.lr_gamma ** passed
    epochs = step // steps_per_epoch if config.lr_interval == "epoch" else step / steps_per_epoch
    if config.lr_scheduler == "exponential_decay":
        return config.lr * config.lr_gamma ** (epochs - config.warmup_epochs)
    share = min(epochs / (config.T_max or config.max_epoch), 1)
    return config.eta_min + (config.lr - config.eta_min) * (1 + math.cos(math.pi * share)) / 2
