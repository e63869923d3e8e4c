#!/usr/bin/env bash
# d3rlpy 2.8.1, fit(dataset, n_steps): its documentation says "n_steps: Number of steps to train"
# and "n_steps_per_epoch: Number of steps per epoch", 10,000 if nothing is said. The data are ten
# episodes of 200 random steps, the algorithm is BC.
# Guess: 5,000 steps train 5,000 updates, 300 in epochs of 250 train 300.
# Truth: whole epochs only. 5,000 train none at all: the weights are those of before, fit returns
#   an empty list, and no warning says so; 300 in epochs of 250 train 250. A short trial therefore
#   needs `n_steps_per_epoch`, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 d3rlpy==2.8.1 gymnasium==1.0.0
"$folder/bin/python" -W ignore - <<'END'
import io
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version

import d3rlpy
import numpy as np
import torch

assert version("d3rlpy") == "2.8.1"
print("d3rlpy", version("d3rlpy"))
torch.set_num_threads(1)
rng, timeouts = np.random.default_rng(0), np.arange(1, 2001) % 200 == 0
states = rng.normal(size=(2000, 3)).astype(np.float32)
torques = rng.uniform(-1, 1, (2000, 1)).astype(np.float32)

for n_steps, more, wanted in ((5000, {}, 0), (300, {"n_steps_per_epoch": 250}, 250),
                              (300, {"n_steps_per_epoch": 300}, 300)):
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        dataset = d3rlpy.dataset.MDPDataset(states, torques, -abs(torques), 0 * timeouts, timeouts)
        algorithm = d3rlpy.algos.BCConfig(batch_size=64).create(device="cpu")
        algorithm.build_with_dataset(dataset)
        before = algorithm.predict(states)
        epochs = algorithm.fit(dataset, n_steps=n_steps, show_progress=False,
                               logger_adapter=d3rlpy.logging.NoopAdapterFactory(), **more)
    moved = abs(algorithm.predict(states) - before).max()
    warned = [line for line in said.getvalue().splitlines()
              if "warn" in line.lower() and "already built" not in line]
    print(f"n_steps={n_steps}, {more}: {algorithm.grad_step} updates in {len(epochs)} epochs,",
          f"actions {'changed' if moved > 0 else 'as before'}, {len(warned)} warnings")
    assert algorithm.grad_step == wanted and (moved > 0) == (wanted > 0) and not warned
END
# Output:
# d3rlpy 2.8.1
# n_steps=5000, {}: 0 updates in 0 epochs, actions as before, 0 warnings
# n_steps=300, {'n_steps_per_epoch': 250}: 250 updates in 1 epochs, actions changed, 0 warnings
# n_steps=300, {'n_steps_per_epoch': 300}: 300 updates in 1 epochs, actions changed, 0 warnings
