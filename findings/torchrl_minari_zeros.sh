#!/usr/bin/env bash
# TorchRL 0.14.1 (tensordict 0.14.3), MinariExperienceReplay(load_from_local_minari=True): "loaded
# directly from the local Minari cache ... useful when working with custom Minari datasets".
# It reads the file, then returns an empty copy (memmap_like keeps no content): all is 0.
# Guess: 2,000 rows, truncated at 199, 399, ..., next states right. Truth: 2,000 rows of zeros.
# Seen: largest state, torque, reward: Minari 8.0, 2.0, 15.8; TorchRL 0, 0, 0; truncated 0 of 10.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 \
    "minari[create,hdf5]==0.5.4" gymnasium==1.4.0 numpy==2.4.6 pillow==13.0.0
cd "$tmp"
export MINARI_DATASETS_PATH="$tmp/minari" OMP_NUM_THREADS=1
"$tmp/venv/bin/python" - 2> "$tmp/err" <<'EOF' || { cat "$tmp/err"; exit 1; }
import logging
from importlib.metadata import version

import gymnasium
import minari
import numpy as np
from torchrl.data.datasets import MinariExperienceReplay

logging.disable()
env = minari.DataCollector(gymnasium.make("Pendulum-v1"))
env.action_space.seed(1)
for episode in range(10):
    env.reset(seed=episode)
    for _ in range(200):
        env.step(env.action_space.sample())
recorded = env.create_dataset("pendulum/random-v0")


def largest(*arrays):
    return [round(float(abs(np.concatenate(x)).max()), 1) for x in arrays]


print(*(f"{name} {version(name)}" for name in ("torchrl", "tensordict", "minari")))
wanted = largest(*zip(*((e.observations, e.actions, e.rewards) for e in recorded)))
replay = MinariExperienceReplay("pendulum/random-v0", batch_size=64, root="torchrl",
                                load_from_local_minari=True)
rows = replay[:]
found = largest(*([rows[key].numpy()] for key in
                  ("observation", "action", ("next", "reward"))))
truncated = int(rows["next", "truncated"].sum())
print("largest state, torque, reward: Minari", wanted, "TorchRL", found)
print("rows", len(rows), "truncated", truncated, "next state",
      float(rows["next", "observation"].abs().max()))
assert min(wanted) > 1 and len(rows) == 2000
assert found == [0, 0, 0] and truncated == 0
assert not rows["next", "observation"].any() and not replay.sample()["observation"].any()
EOF
