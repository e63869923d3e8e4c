#!/usr/bin/env bash
# d3rlpy 2.8.1, MDPDataset(observations, actions, rewards, terminals, timeouts): a recording of 450
# steps of Pendulum-v1, two whole episodes and a quarter of a third.
# Guess: 450 rows give 447 transitions (an episode cut short has no state after its last row), or
#   a warning.
# Truth: rows behind the last flag are dropped without a word: 400 rows, 398 transitions. Whoever
#   stops a recording in mid-episode must set `timeouts` in its last row; then there are 447.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 d3rlpy==2.8.1 gymnasium==1.0.0
"$folder/bin/python" -W ignore - <<'END'
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version

import gymnasium as gym
import numpy as np
from d3rlpy.dataset import MDPDataset

assert version("d3rlpy") == "2.8.1"
print("d3rlpy", version("d3rlpy"))


def load(last):
    """The dataset of 450 rows, and what was said; with last=True the last row has a timeout."""
    env = gym.make("Pendulum-v1")
    env.action_space.seed(0)
    state, _ = env.reset(seed=0)
    rows = []
    for _ in range(450):
        torque = env.action_space.sample()
        next_state, reward, terminal, timeout, _ = env.step(torque)
        rows.append((state, torque, reward, terminal, timeout))
        state = env.reset()[0] if timeout else next_state
    columns = [np.array(column) for column in zip(*rows)]
    columns[4][-1] |= last
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        dataset = MDPDataset(*columns[:4], timeouts=columns[4])
    return dataset, said.getvalue()


for last, rows, transitions in ((False, 400, 398), (True, 450, 447)):
    dataset, said = load(last)
    found = sum(episode.size() for episode in dataset.episodes)
    print(f"{'with' if last else 'without'} a timeout in row 449: {found} of 450 rows, "
          f"{dataset.transition_count} transitions in {len(dataset.episodes)} episodes")
    words = [line for line in said.splitlines() if "warn" in line.lower() or "drop" in line.lower()]
    print("  it said:", words or "nothing of it")
    assert (found, dataset.transition_count, words) == (rows, transitions, [])
END
# Output:
# d3rlpy 2.8.1
# without a timeout in row 449: 400 of 450 rows, 398 transitions in 2 episodes
#   it said: nothing of it
# with a timeout in row 449: 450 of 450 rows, 447 transitions in 3 episodes
#   it said: nothing of it
