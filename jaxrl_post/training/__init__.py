"""Training: roles, state, the train step, the loop, checkpoints and what is logged."""

from jaxrl_post.training.optimizers import make_optimizer, make_schedule, parted, whole
from jaxrl_post.training.roles import soup
from jaxrl_post.training.router import RouterLoss
from jaxrl_post.training.state import TrainState, init, state_shardings
from jaxrl_post.training.step import make_step

__all__ = [
    "RouterLoss",
    "TrainState",
    "init",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "parted",
    "soup",
    "state_shardings",
    "whole",
]
