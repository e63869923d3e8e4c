#!/usr/bin/env bash
# Gymnasium 1.4.0, ClipAction ("within the environment's action_space") below Minari 0.5.4's
# DataCollector, random policy env.action_space.sample().
# Guess: torques uniform on (-2, 2), recorded clipped. Truth: the wrapper's action space is
# (-inf, inf), whose samples are standard normal, and what is recorded is the unclipped torque.
# Seen: Box(-inf, inf); standard deviation 1.00, not 1.15; 4.3 % beyond 2 N m, the largest 3.9 N m.
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
env = minari.DataCollector(gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1")))
print("action space", env.action_space)
env.action_space.seed(0)
for episode in range(20):
    env.reset(seed=episode)
    for _ in range(200):
        env.step(env.action_space.sample())
dataset = env.create_dataset("pendulum/clip-v0")
torque = np.concatenate([episode.actions[:, 0] for episode in dataset])
beyond = (abs(torque) > 2).mean()
print(f"{len(torque)} torques: standard deviation {torque.std():.2f} (uniform: 1.15), "
      f"beyond 2 N m {beyond:.1%}, largest {abs(torque).max():.1f}")
assert not env.action_space.is_bounded() and len(torque) == 4000
assert 0.95 < torque.std() < 1.05 and 0.03 < beyond < 0.06 and abs(torque).max() > 2.5
EOF
