#!/usr/bin/env bash
# imitation 1.0.1, rollout.rollout: a trajectory's `terminal` answers, in its documentation, "does
# this trajectory (fragment) end in a terminal state?". Pendulum-v1 has no terminal state, only a
# time limit of 200 steps.
# Guess: terminal is False, and `dones` of the flattened transitions are False.
# Truth: terminal is True and the last row of each episode is done: the documentation goes on that
#   "episodes are always terminal". That it was a time limit stands only in the infos, which
#   rollout() leaves out unless it is called with exclude_infos=False.
# Page's error: timeout.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 imitation==1.0.1 stable-baselines3==2.2.1 gymnasium==0.29.1 numpy==1.26.4
"$folder/bin/python" -W ignore - <<'END'
from importlib.metadata import version

import numpy as np
import torch
from imitation.data import rollout
from imitation.data.wrappers import RolloutInfoWrapper
from imitation.util.util import make_vec_env

assert version("imitation") == "1.0.1"
print("imitation", version("imitation"))
torch.set_num_threads(1)
rng = np.random.default_rng(0)
venv = make_vec_env("Pendulum-v1", rng=rng, n_envs=2,
                    post_wrappers=[lambda env, _: RolloutInfoWrapper(env)])
enough = rollout.make_sample_until(min_episodes=4)
episodes = rollout.rollout(None, venv, enough, rng=rng)
for episode in episodes:
    print(f"{len(episode)} steps: terminal {episode.terminal}, infos {episode.infos}")
    assert len(episode) == 200 and episode.terminal and episode.infos is None
rows = np.flatnonzero(rollout.flatten_trajectories(episodes).dones).tolist()
print("flattened: dones is True in rows", rows)
assert rows == [199, 399, 599, 799]

episodes = rollout.rollout(None, venv, enough, rng=rng, exclude_infos=False)
limits = [bool(episode.infos[-1]["TimeLimit.truncated"]) for episode in episodes]
print("with exclude_infos=False: terminal", [episode.terminal for episode in episodes],
      "TimeLimit.truncated", limits)
assert limits == [True] * 4 and all(episode.terminal for episode in episodes)
END
# Output:
# imitation 1.0.1
# 200 steps: terminal True, infos None
# 200 steps: terminal True, infos None
# 200 steps: terminal True, infos None
# 200 steps: terminal True, infos None
# flattened: dones is True in rows [199, 399, 599, 799]
# with exclude_infos=False: terminal [True, True, True, True] TimeLimit.truncated [True, True, True,
#     True]
