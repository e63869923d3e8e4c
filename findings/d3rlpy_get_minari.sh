#!/usr/bin/env bash
# d3rlpy 2.8.1, get_minari ("returns minari dataset"), with a recording of Minari 0.5.4.
# Minari keeps 201 states for 200 torques; get_minari joins both as they are and cuts by torques, so
# that the states of every episode but the first belong to other rows, one more in each episode.
# Guess: 2,000 transitions, next states right. Truth: rewards fit state and torque in the first
# episode alone. Seen: 100 % of the first; 0 % of the nine others; its second begins with the
# first one's last state.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 d3rlpy==2.8.1 \
    "minari[create,hdf5]==0.5.4" gymnasium==1.0.0 numpy==2.4.6 pillow==13.0.0
cd "$tmp"
export MINARI_DATASETS_PATH="$tmp/minari" OMP_NUM_THREADS=1
"$tmp/venv/bin/python" - 2> "$tmp/err" <<'EOF' || { cat "$tmp/err"; exit 1; }
from importlib.metadata import version

import gymnasium
import minari
import numpy as np
from d3rlpy.datasets import get_minari

env = minari.DataCollector(gymnasium.make("Pendulum-v1"))
env.action_space.seed(1)
for episode in range(10):
    env.reset(seed=episode)
    for _ in range(200):
        env.step(env.action_space.sample())
recorded = env.create_dataset("pendulum/random-v0")


def fits(states, torques, rewards):
    """The share of rows whose reward is Pendulum's for their state and torque."""
    angle = np.arctan2(states[:, 1], states[:, 0])
    wanted = -(angle ** 2 + 0.1 * states[:, 2] ** 2 + 0.001 * torques[:, 0] ** 2)
    return np.isclose(rewards, wanted, atol=1e-3).mean()


print("d3rlpy", version("d3rlpy"), "minari", version("minari"))
assert all(fits(e.observations[:-1], e.actions, e.rewards) == 1 for e in recorded)
dataset, _ = get_minari("pendulum/random-v0")
shares = [fits(e.observations, e.actions, e.rewards[:, 0]) for e in dataset.episodes]
print("rewards that fit, by episode:", *(f"{share:.0%}" for share in shares))
assert len(shares) == 10 and shares[0] == 1 and max(shares[1:]) < 0.2
second = dataset.episodes[1].observations[0]
print("the second episode begins with the first one's last state:", second)
assert np.array_equal(second, recorded[0].observations[-1])
EOF
