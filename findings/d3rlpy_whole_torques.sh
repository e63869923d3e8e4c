#!/usr/bin/env bash
# d3rlpy 2.8.1, MDPDataset: a recording of a bang-bang controller, float32 torques of -2 and 2 N m.
# Guess: float32 actions, two of them negative numbers, are continuous.
# Truth: whole numbers make them discrete, "3 actions" (the largest and one more), which only a
#   line of its log tells; CQL refuses the dataset, and one torque of 1.5 among 400 makes it
#   continuous. Whoever records a controller passes action_space=ActionSpace.CONTINUOUS.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile \
    torch==2.13.0 d3rlpy==2.8.1 gymnasium==1.0.0
"$folder/bin/python" -W ignore - <<'END' 2> >(grep -v -i gym >&2)
import logging
from importlib.metadata import version

import numpy as np
import structlog
from d3rlpy import ActionSpace
from d3rlpy.algos import CQLConfig
from d3rlpy.dataset import MDPDataset
from d3rlpy.logging import NoopAdapterFactory

assert version("d3rlpy") == "2.8.1"
print("d3rlpy", version("d3rlpy"))
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
rng = np.random.default_rng(0)
state = rng.normal(size=[400, 3]).astype(np.float32)
bang_bang = np.where(state[:, 2:] > 0, 2, -2).astype(np.float32)
nearly = bang_bang.copy()
nearly[7] = 1.5
timeout = np.arange(1, 401) % 200 == 0

for name, torque, options, expected in (
        ("-2 and 2", bang_bang, {}, (ActionSpace.DISCRETE, 3)),
        ("-2, 2 and one 1.5", nearly, {}, (ActionSpace.CONTINUOUS, 1)),
        ("-2 and 2, told", bang_bang, {"action_space": ActionSpace.CONTINUOUS, "action_size": 1},
         (ActionSpace.CONTINUOUS, 1))):
    dataset = MDPDataset(state, torque, np.ones(400), np.zeros(400), timeouts=timeout, **options)
    info = dataset.dataset_info
    try:
        CQLConfig().create(device="cpu:0").fit(dataset, n_steps=1, n_steps_per_epoch=1,
                                               show_progress=False,
                                               logger_adapter=NoopAdapterFactory())
        said = "takes it"
    except AssertionError as error:
        said = "says: " + str(error).split(".")[0]
    print(f"{name}: {info.action_space.name}, action size {info.action_size}; CQL {said}")
    assert (info.action_space, info.action_size) == expected
    assert (said == "takes it") == (info.action_space == ActionSpace.CONTINUOUS)
END
# Output:
# d3rlpy 2.8.1
# -2 and 2: DISCRETE, action size 3; CQL says: The action-space of the given dataset is not
#     compatible with the algorithm
# -2, 2 and one 1.5: CONTINUOUS, action size 1; CQL takes it
# -2 and 2, told: CONTINUOUS, action size 1; CQL takes it
