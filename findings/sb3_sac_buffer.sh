#!/usr/bin/env bash
# Stable-Baselines3 2.9.2, SAC's replay buffer: whoever saves `model.replay_buffer`, as its guide
# shows (save_replay_buffer), and reads its arrays as recorded transitions. The torques that the
# environment got are written down beside it, and the rewards tell which of the two are right.
# Guess: actions are the torques, from -2 to 2; dones are 0 at Pendulum's time limit, as in a
#   batch of sample().
# Truth: actions are the torques / 2; dones are 1 at the limit, and only sample() gives 0 (the
#   array `timeouts` beside it is what it multiplies with).
# Page's error, for a reader of `dones`: timeout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0
"$folder/bin/python" -W ignore - <<'END'
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC

assert version("stable-baselines3") == "2.9.2"
print("stable-baselines3", version("stable-baselines3"), "gymnasium", gym.__version__)
torch.set_num_threads(1)


class Witness(gym.Wrapper):
    torques = []

    def step(self, action):
        self.torques.append(float(action[0]))
        return self.env.step(action)


model = SAC("MlpPolicy", Witness(gym.make("Pendulum-v1")), seed=0, learning_starts=600,
            buffer_size=600)
model.learn(600)
buffer = model.replay_buffer
state, actions = buffer.observations[:, 0], buffer.actions[:, 0, 0]
given = np.array(Witness.torques)
print(f"torques given: {given.min():.2f} to {given.max():.2f}; in the buffer: "
      f"{actions.min():.2f} to {actions.max():.2f}")
assert given.max() > 1.9 and np.allclose(2 * actions, given, atol=1e-5)

for name, torque in (("actions", actions), ("2 actions", 2 * actions)):
    angle = np.arctan2(state[:, 1], state[:, 0])
    reward = -(angle ** 2 + 0.1 * state[:, 2] ** 2 + 0.001 * torque ** 2)
    error = np.abs(reward - buffer.rewards[:, 0]).max()
    print(f"reward computed from {name}: largest error {error:.1e}")
    assert (error < 1e-4) == (name == "2 actions")

rows = np.flatnonzero(buffer.dones[:, 0]).tolist()
print("dones is 1 in rows", rows, "timeouts in rows", np.flatnonzero(buffer.timeouts).tolist())
sampled = buffer._get_samples(np.arange(600)).dones.sum().item()
drawn = buffer.sample(10_000).dones.sum().item()
print("as sample() hands them out: ones among all rows", sampled, "and among 10,000 drawn", drawn)
assert rows == [199, 399, 599] and sampled == drawn == 0
END
# Output:
# stable-baselines3 2.9.2 gymnasium 1.4.0
# torques given: -2.00 to 2.00; in the buffer: -1.00 to 1.00
# reward computed from actions: largest error 3.0e-03
# reward computed from 2 actions: largest error 1.9e-06
# dones is 1 in rows [199, 399, 599] timeouts in rows [199, 399, 599]
# as sample() hands them out: ones among all rows 0.0 and among 10,000 drawn 0.0
