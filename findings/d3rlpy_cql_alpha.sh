#!/usr/bin/env bash
# d3rlpy 2.8.1, CQL with its defaults: conservative_weight 5, initial_alpha 1; alpha is, says its
# documentation, "automatically adjustable" and grows where Q of other actions is above that of the
# data's by more than a threshold. The data: 20 episodes of Pendulum-v1, a controller with noise.
# Guess: the penalty settles near the strength it starts with, as CQL is named after it.
# Truth: the threshold (alpha_threshold, 10) is never reached, so alpha only falls, as fast as its
#   rate of 1e-4 lets it, by exp(-0.1) in each 1,000 updates, and the penalty fades away.
#   With alpha_learning_rate=0 alpha stays 1. critic_loss is negative either way, as alpha times
#   the threshold is taken off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 d3rlpy==2.8.1 gymnasium==1.0.0
"$folder/bin/python" -W ignore - <<'END' 2> >(grep -v -i gym >&2)
import logging
import math
from importlib.metadata import version

import d3rlpy
import gymnasium as gym
import numpy as np
import structlog
import torch

assert version("d3rlpy") == "2.8.1"
print("d3rlpy", version("d3rlpy"))
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
torch.set_num_threads(1)
d3rlpy.seed(0)
noise = np.random.default_rng(0)


def controller(state):
    """Feedback near upright, elsewhere the torque that brings the energy to the upright one's."""
    cos, sin, speed = state
    if cos > 0.9:
        torque = -12 * math.atan2(sin, cos) - 2 * speed
    else:
        torque = 2 * (5 - 5 * cos - speed ** 2 / 6) * speed    # mass 1, length 1, g 10
    return np.clip([torque + noise.normal(scale=0.5)], -2, 2).astype(np.float32)


env = gym.make("Pendulum-v1")
rows = []
for episode in range(20):
    state, _ = env.reset(seed=episode)
    timeout = False
    while not timeout:
        torque = controller(state)
        next_state, reward, _, timeout, _ = env.step(torque)
        rows.append((state, torque, reward, 0, timeout))
        state = next_state
columns = [np.array(column) for column in zip(*rows)]
print(f"the data: mean return {columns[2].sum() / 20:.0f}")
dataset = d3rlpy.dataset.MDPDataset(*columns[:4], timeouts=columns[4])

print("alpha_learning_rate   updates    alpha   critic_loss")
for options, rate in (({}, 1e-4), ({"alpha_learning_rate": 0.0}, 0.0)):
    config = d3rlpy.algos.CQLConfig(
        actor_encoder_factory=d3rlpy.models.VectorEncoderFactory([64, 64]),
        critic_encoder_factory=d3rlpy.models.VectorEncoderFactory([64, 64]), **options)
    cql = config.create(device="cpu:0")
    for epoch, metrics in cql.fitter(
            dataset, n_steps=1000, n_steps_per_epoch=500, show_progress=False,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory()):
        alpha = next(cql.impl.modules.log_alpha.parameters()).exp().item()
        print(f"{config.alpha_learning_rate:19.4f}   {500 * epoch:7d}   {alpha:.4f}   "
              f"{metrics['critic_loss']:11.2f}")
        assert abs(alpha - math.exp(-rate * 500 * epoch)) < 0.003
        assert metrics["critic_loss"] < 0
END
# Output:
# d3rlpy 2.8.1
# the data: mean return -144
# alpha_learning_rate   updates    alpha   critic_loss
#              0.0001       500   0.9513        -55.06
#              0.0001      1000   0.9038        -58.39
#              0.0000       500   1.0000        -56.84
#              0.0000      1000   1.0000        -63.42
