"""Options that make training impossible or useless. No Hydra, no torch."""

from omegaconf import DictConfig

from ssl_runner.config.rules import format_value, is_list
from ssl_runner.errors import UsageError
from ssl_runner.rule import Rule


def check_training(config: DictConfig) -> None:
    """Raise UsageError for a batch of one image, and for `optimizer.betas` other than two numbers.

    Accepts any configuration of a solver that takes no gradient steps.
    """
    if config.solver.get("_target_") != "ssl_runner.train.Pretraining":
        return
    if config.batch_size == 1:
        raise UsageError(
            "batch_size=1: expected 2 or more, because all rows of one image are positives and the loss has"
            " no negatives; use a larger batch"
        )
    betas, beta = config.optimizer.get("betas"), Rule(float, low=0, high=1)
    if betas is not None and not (is_list(betas, beta.accepts) and len(betas) == 2):
        raise UsageError(
            f"optimizer.betas={format_value(betas)}: expected two numbers from 0 to 1, such as [0.9,0.999]"
        )
