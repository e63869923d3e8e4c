#!/usr/bin/env bash
# Gymnasium 1.4.0: env.reset(seed=s) and env.action_space.seed(s), as many scripts do for a random
# policy. The two generators have nothing to do with each other by name, but are the same stream.
# Guess: start and first torque are independent (|correlation| below 0.1 over 200 seeds).
# Truth: the first torque is 2 / pi times the start's angle, the second twice its speed.
# Seen: correlations 1.000 and 1.000; largest |torque - 2 angle / pi| 1e-07 N m.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile gymnasium==1.4.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
from importlib.metadata import version

import gymnasium
import numpy as np

print("gymnasium", version("gymnasium"), "numpy", np.__version__)
env = gymnasium.make("Pendulum-v1")
starts, torques = [], []
for seed in range(200):
    state, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    starts.append([np.arctan2(state[1], state[0]), state[2]])
    torques.append([env.action_space.sample()[0], env.action_space.sample()[0]])
starts, torques = np.array(starts), np.array(torques)                   # [200, 2] each
same = [np.corrcoef(starts[:, i], torques[:, i])[0, 1] for i in (0, 1)]
print("correlations: angle and first torque, speed and second torque:", np.round(same, 3))
error = abs(torques - starts * [2 / np.pi, 2]).max()
print(f"largest |torque - (2 / pi angle, 2 speed)|: {error:.0e}")
assert min(same) > 0.999 and error < 1e-5
for seed in range(200):                                                 # the cure: another seed
    env.action_space.seed(seed + 1000)
    torques[seed, 0] = env.action_space.sample()[0]
apart = np.corrcoef(starts[:, 0], torques[:, 0])[0, 1]
print("with another seed for the torques:", round(apart, 2))
assert abs(apart) < 0.3
EOF
