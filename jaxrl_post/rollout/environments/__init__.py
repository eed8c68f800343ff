"""Environments written in JAX, for `rollout.generate_turns`: what one is, and some that speak in characters."""

from jaxrl_post.rollout.environments.calculator import calculator
from jaxrl_post.rollout.environments.gridworld import gridworld
from jaxrl_post.rollout.environments.interface import Environment, Text, Transition, character_tokens

__all__ = ["Environment", "Text", "Transition", "calculator", "character_tokens", "gridworld"]
