#!/usr/bin/env bash
# RLlib 2.60.0, config.offline_data(output=...): its documentation says "where experiences should
# be saved"; another option, output_max_rows_per_file, is the "max output row numbers before
# rolling over to a new file". Here PPO plays 8 episodes of Pendulum-v1 in four calls of train, and
# what it wrote is read with pandas.
# Guess: 1,600 rows, whose actions are torques, or at least lie in (-1, 1).
# Truth: 4,000 rows, as each call writes all rows again from the first on; with
#   output_max_rows_per_file=50 only 200 of the 1,600 are there, the last 50 of each call. Actions
#   are the Gaussian's, some beyond (-1, 1): the torque was clip(2 a, -2, 2), as the rewards tell.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 "ray[rllib]==2.60.0" gymnasium==1.2.2
RAY_USAGE_STATS_ENABLED=0 "$folder/bin/python" -W ignore - "$folder" <<'END'
import logging
import pathlib
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig

assert version("ray") == "2.60.0"
print("ray", version("ray"))
torch.set_num_threads(1)
logging.disable(logging.WARNING)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error",
         _temp_dir=sys.argv[1] + "/ray")
ray.data.DataContext.get_current().enable_progress_bars = False


def record(name, **options):
    """What four calls of train wrote, a frame, and how many steps they said they had made."""
    output = pathlib.Path(sys.argv[1], name)
    config = (PPOConfig().environment("Pendulum-v1").debugging(seed=0)
              .env_runners(num_env_runners=0, rollout_fragment_length=400)
              .training(train_batch_size_per_learner=400, minibatch_size=200, num_epochs=1)
              .offline_data(output=str(output), output_write_episodes=False,
                            output_compress_columns=[], **options))
    algorithm = config.build_algo()
    for _ in range(4):
        steps = algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"]
    algorithm.stop()
    files = sorted(output.rglob("*.parquet"))
    return pd.concat([pd.read_parquet(file) for file in files]), int(steps)


rows, steps = record("all")
state, action, reward = (np.stack(rows[name]).squeeze() for name in ("obs", "actions", "rewards"))
different = len(np.unique(state, axis=0))
print(f"{steps} steps played, {len(rows)} rows written, {different} different states among them")
assert (steps, len(rows), different) == (1600, 4000, 1600)

print(f"actions from {action.min():.2f} to {action.max():.2f}, "
      f"{(np.abs(action) > 1).mean():.0%} beyond (-1, 1)")
assert np.abs(action).max() > 1.5
angle = np.arctan2(state[:, 1], state[:, 0])
for name, torque in (("a", action), ("2 a", 2 * action), ("clip(2 a)", np.clip(2 * action, -2, 2))):
    error = np.abs(-(angle ** 2 + 0.1 * state[:, 2] ** 2 + 0.001 * torque ** 2) - reward).max()
    print(f"reward computed with the torque {name}: largest error {error:.1e}")
    assert (error < 1e-4) == (name == "clip(2 a)")

rows, steps = record("rolled", output_max_rows_per_file=50)
print(f"output_max_rows_per_file=50: {steps} steps played, {len(rows)} rows written")
assert (steps, len(rows)) == (1600, 200)
ray.shutdown()
END
# Output:
# ray 2.60.0
# 1600 steps played, 4000 rows written, 1600 different states among them
# actions from -4.20 to 3.52, 38% beyond (-1, 1)
# reward computed with the torque a: largest error 1.4e-02
# reward computed with the torque 2 a: largest error 6.7e-02
# reward computed with the torque clip(2 a): largest error 2.2e-06
# output_max_rows_per_file=50: 1600 steps played, 200 rows written
