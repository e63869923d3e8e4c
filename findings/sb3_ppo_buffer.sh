#!/usr/bin/env bash
# Stable-Baselines3 2.9.2, PPO's rollout buffer: its documentation has it as transitions "collected
# using the current policy". Here it is read after a rollout of 1,024 steps of Pendulum-v1, beside
# what the environment was given and answered.
# Guess: rewards and actions are those of the environment.
# Truth: at each time limit gamma times the critic's value of the last state is added to the
#   reward; actions are the Gaussian's before it is clipped, some of them outside (-2, 2).
# Page's error: none for PPO itself, whose target is right so; a recording made of it has wrong
#   rewards where the page has wrong ends.
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
from stable_baselines3 import PPO

assert version("stable-baselines3") == "2.9.2"
print("stable-baselines3", version("stable-baselines3"), "gymnasium", gym.__version__)
torch.set_num_threads(1)


class Witness(gym.Wrapper):
    rows = []

    def step(self, action):
        answer = self.env.step(action)
        self.rows.append((float(action[0]), float(answer[1]), answer[0]))
        return answer


# one epoch whose rate is so small that the critic below is still the one that the rollout asked
model = PPO("MlpPolicy", Witness(gym.make("Pendulum-v1")), n_steps=1024, n_epochs=1, seed=0,
            learning_rate=1e-30)
model.learn(1024)
torque, reward, last = (np.array(column) for column in zip(*Witness.rows))
buffer = model.rollout_buffer

added = buffer.rewards[:, 0] - reward
rows = np.flatnonzero(np.abs(added) > 1e-4)
with torch.no_grad():
    value = model.policy.predict_values(torch.as_tensor(last[rows]))[:, 0].numpy()
print("rewards differ in rows", rows.tolist())
for row, more, v in zip(rows, added[rows], value):
    print(f"  row {row}: the environment's {reward[row]:.4f}, the buffer's "
          f"{buffer.rewards[row, 0]:.4f}; gamma * value of the last state {model.gamma * v:.4f}")
assert rows.tolist() == [199, 399, 599, 799, 999]
assert np.allclose(added[rows], model.gamma * value, atol=1e-4)

stored = buffer.actions.reshape(-1)
outside = np.abs(stored) > 2
print(f"{outside.mean():.1%} of the actions lie outside (-2, 2); largest "
      f"{np.abs(stored).max():.2f}, given to the environment {np.abs(torque).max():.2f}")
assert 0.02 < outside.mean() < 0.1 and np.abs(torque).max() == 2
assert np.allclose(np.clip(stored, -2, 2), torque)
END
# Output:
# stable-baselines3 2.9.2 gymnasium 1.4.0
# rewards differ in rows [199, 399, 599, 799, 999]
#   row 199: the environment's -8.8096, the buffer's -8.8257; gamma * value of the last state
#     -0.0161
#   row 399: the environment's -6.4171, the buffer's -6.5704; gamma * value of the last state
#     -0.1533
#   row 599: the environment's -3.5864, the buffer's -3.7086; gamma * value of the last state
#     -0.1223
#   row 799: the environment's -1.3539, the buffer's -1.3474; gamma * value of the last state 0.0065
#   row 999: the environment's -2.1406, the buffer's -1.8451; gamma * value of the last state 0.2955
# 5.8% of the actions lie outside (-2, 2); largest 3.60, given to the environment 2.00
