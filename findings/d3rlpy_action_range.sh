#!/usr/bin/env bash
# d3rlpy 2.8.1 on Pendulum's torques: action_scaler is None by default, and the observation scaler's
# page of its documentation trains CQLConfig() so, on the Pendulum data that it offers. The data
# here: random states, in each a torque of 1.8 to 2 N m, reward 1 for each step.
# Guess: behaviour cloning and CQL learn to give 1.9 N m.
# Truth: no policy of d3rlpy gives more than 1 N m, half of Pendulum's torque, whatever the data's
#   largest action is, and CQL's random actions lie in (-1, 1) as well, where there is no row of
#   data; not a word about it. With action_scaler=MinMaxActionScaler([-2], [2]) both go beyond.
# Page's error: range.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 d3rlpy==2.8.1 gymnasium==1.0.0
"$folder/bin/python" -W ignore - <<'END' 2> >(grep -v -i gym >&2)
import logging
from importlib.metadata import version

import d3rlpy
import numpy as np
import structlog
import torch
from d3rlpy.preprocessing import MinMaxActionScaler

assert version("d3rlpy") == "2.8.1"
print("d3rlpy", version("d3rlpy"))
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
torch.set_num_threads(1)
rng = np.random.default_rng(0)
angle = rng.uniform(-np.pi, np.pi, 400)
state = np.stack([np.cos(angle), np.sin(angle), rng.uniform(-8, 8, 400)], 1).astype(np.float32)
torque = rng.uniform(1.8, 2, [400, 1]).astype(np.float32)
timeout = np.arange(1, 401) % 200 == 0
dataset = d3rlpy.dataset.MDPDataset(state, torque, np.ones(400), np.zeros(400), timeouts=timeout)
small = d3rlpy.models.VectorEncoderFactory([32])
configs = {
    "bc": (d3rlpy.algos.BCConfig, {"encoder_factory": small}),
    "cql": (d3rlpy.algos.CQLConfig, {
        "actor_encoder_factory": small, "critic_encoder_factory": small, "n_action_samples": 5,
        "alpha_learning_rate": 0.0, "actor_learning_rate": 1e-3}),
}

for scaled in (False, True):
    scaler = MinMaxActionScaler(minimum=[-2.0], maximum=[2.0]) if scaled else None
    for name, (config, options) in configs.items():
        d3rlpy.seed(0)
        agent = config(action_scaler=scaler, batch_size=64, **options).create(device="cpu:0")
        agent.fit(dataset, n_steps=1500, n_steps_per_epoch=1500, show_progress=False,
                  logger_adapter=d3rlpy.logging.NoopAdapterFactory())
        given = agent.predict(state)
        print(f"{name:3s} {'with' if scaled else 'without'} action_scaler: torques from "
              f"{given.min():.3f} to {given.max():.3f}")
        assert given.max() > 1.8 if scaled else 0.85 < given.max() <= 1

asked = []
without = d3rlpy.algos.CQLConfig(critic_encoder_factory=small).create(device="cpu:0")
without.build_with_dataset(dataset)
forwarder = without.impl.q_function[0]
forwarder.register_forward_pre_hook(lambda module, args: asked.append(args[1].detach()))
without.update(dataset.sample_transition_batch(64))
other = torch.cat([actions[actions < 1.8] for actions in asked])
print(f"CQL asks its critic {len(other)} actions that are not the data's, from {other.min():.3f} "
      f"to {other.max():.3f}")
assert len(other) > 1000 and -1 <= other.min() < -0.98 and 0.98 < other.max() <= 1
END
# Output:
# d3rlpy 2.8.1
# bc  without action_scaler: torques from 0.986 to 1.000
# cql without action_scaler: torques from 0.817 to 0.903
# bc  with action_scaler: torques from 1.781 to 2.000
# cql with action_scaler: torques from 1.734 to 1.839
# CQL asks its critic 1984 actions that are not the data's, from -0.993 to 0.997
