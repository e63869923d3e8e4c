#!/usr/bin/env bash
# Minari 0.5.4's DataCollector around Gymnasium 1.4.0's Autoreset wrapper (the step after an end
# is a reset, whose torque is ignored). Guess: it refuses, or asks for a reset.
# Truth: it records on; from the second episode on each has 201 steps, and the first of them leads
# from the old episode's last state to a new start, with reward 0, the best that Pendulum can pay.
# Seen: steps 200, 201, 201; first rewards -0.76, 0, 0; first turns 0.01, 0.47, 0.84 rad (0.4 is
# the most that a step can turn).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile "minari[create,hdf5]==0.5.4" gymnasium==1.4.0 \
    numpy==2.4.6 pillow==13.0.0
cd "$tmp"
MINARI_DATASETS_PATH="$tmp/minari" "$tmp/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import gymnasium
import minari
import numpy as np

print("minari", version("minari"), "gymnasium", version("gymnasium"))
env = minari.DataCollector(gymnasium.wrappers.Autoreset(gymnasium.make("Pendulum-v1")))
env.reset(seed=0)
env.action_space.seed(1)
for _ in range(602):
    env.step(env.action_space.sample())
steps, first, turns = [], [], []
for episode in env.create_dataset("pendulum/autoreset-v0"):
    angle = np.unwrap(np.arctan2(episode.observations[:, 1], episode.observations[:, 0]))
    steps.append(len(episode.actions))
    first.append(float(episode.rewards[0]))
    turns.append(float(abs(np.diff(angle)[0])))
print("steps of an episode", steps)
print("rewards of their first steps", np.round(first, 2))
print("turn in their first step (at most 0.4 = 8 rad/s * 0.05 s)", np.round(turns, 2))
assert steps == [200, 201, 201] and first[0] < 0 and first[1:] == [0, 0]
assert turns[0] <= 0.401 and max(turns[1:]) > 0.5
EOF
