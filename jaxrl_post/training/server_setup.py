"""The inference server that a run samples at, and how the policy gets there.

What is sent to it is in `rollout.served`.
"""

from __future__ import annotations

import os
from typing import Any

import jax

from jaxrl_post.rollout import Prompts, SamplingParams, Server, check_server, merge_groups, served, update_weights
from jaxrl_post.training.config import Config, ConfigError, ModelConfig, ServerConfig
from jaxrl_post.training.generation import Generation
from jaxrl_post.training.model_setup import Models, check_export, export
from jaxrl_post.types import Array, Params, Rollouts


class PolicyServer:
    """A server that has the policy of some step.

    Args:
        config: of the run, with `rollout.server`.
        made: the run's models.
        tokenizer: of the policy, whose files go to the server with the weights.

    Raises:
        ConfigError: if the environment has no key where one is named.
    """

    def __init__(self, config: Config, made: Models, tokenizer: Any):
        options = config.rollout.server
        assert options is not None
        key = None if options.api_key is None else os.environ.get(options.api_key)
        if options.api_key is not None and not key:
            raise ConfigError([f"rollout.server.api_key: the environment variable {options.api_key} is not set"])
        self._server = make_server(options, key)
        self._options, self._config, self._models, self._tokenizer = options, config, made, tokenizer
        self._version: int | None = None

    def update(self, params: Params, version: int) -> None:
        """Give the server this version of the policy, where it is time to."""
        directory = self._options.weights
        if directory is None or (self._version is not None and version % self._options.every):
            return
        export(self._models, self._config.model, self._tokenizer, params, directory)
        update_weights(self._server, os.path.abspath(directory))
        self._version = version

    def sample(self, prompts: Prompts, key: Array, how: Generation) -> Rollouts:
        """Groups of completions, as `sample_groups` makes them, of the version that the server has."""
        size = how.group_size // how.parts
        sampled = served(
            self._server,
            prompts,
            key,
            sampling=how.sampling,
            max_new_tokens=how.max_new_tokens,
            group_size=size,
            version=self._version or 0,
        )
        return as_if_served(sampled if how.parts == 1 else merge_groups(sampled, how.parts))


def make_server(options: ServerConfig, api_key: str | None = None) -> Server:
    """The server that the configuration names."""
    return Server(
        options.url,
        options.kind,
        options.model,
        options.log_probs,
        api_key,
        options.timeout,
        options.concurrency,
        options.retries,
    )


def as_if_served(rollouts: Rollouts) -> Rollouts:
    """With the one field more that a server's have, whatever its log-probs are of."""
    return rollouts.replace(extras={"sampler_logp": rollouts.extras.get("sampler_logp", rollouts.logp)})


def check_served(
    options: ServerConfig, model: ModelConfig, made: Models, tokenizer: Any, sampling: SamplingParams
) -> None:
    """Raise ConfigError for a server that cannot be asked for what the run samples, or not be given the policy."""
    if jax.process_count() > 1:
        raise ConfigError(["rollout.server: one process asks it, and this run has several; leave it out"])
    try:
        check_server(make_server(options), sampling)
        check_export(model, made, tokenizer, options.weights, "rollout.server.weights")
    except ValueError as error:
        raise ConfigError([f"rollout.server: {error}"]) from None
