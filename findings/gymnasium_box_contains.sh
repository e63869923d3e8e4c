#!/usr/bin/env bash
# Gymnasium 1.4.0, Box.contains (`x in space`): "if x is a valid member of this space".
# Guess: a torque of 1.5 N m, which step() plays, is in Pendulum-v1's action space, whatever holds
#   it; the filter `[row in space for row in log]` keeps 2,000 good torques of 2,000 that a CSV
#   file, JSON or NumPy's own random numbers gave.
# Truth: an array of float64 or of whole numbers never is, since NumPy may not cast it to float32;
#   the list [1.5] is, and so is the array in float32. The filter keeps 0 of 2,000; as float32
#   2,000. step() gives the same state for all three.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile gymnasium==1.4.0 numpy==2.4.6
"$folder/bin/python" -W ignore - <<'END'
import gymnasium
import numpy as np

print("gymnasium", gymnasium.__version__, "numpy", np.__version__)
env = gymnasium.make("Pendulum-v1")
space = env.action_space
states = []
for torque, wanted in (([1.5], True), (np.array([1.5], np.float32), True),
                       (np.array([1.5]), False)):
    env.reset(seed=0)
    states.append(env.step(torque)[0])
    print(f"{torque!r:32} in the space: {torque in space!s:6} state after it: {states[-1]}")
    assert (torque in space) is wanted
assert all((state == states[0]).all() for state in states)
assert [1] in space and np.array([1]) not in space          # a whole 1 N m

log = np.random.default_rng(0).uniform(-2, 2, (2000, 1))
kept = sum(row in space for row in log)
kept_float32 = sum(row in space for row in log.astype(np.float32))
print("torques kept of 2,000:", kept, "and as float32", kept_float32)
assert kept == 0 and kept_float32 == 2000
END
# Output (shortened):
# gymnasium 1.4.0 numpy 2.4.6
# [1.5]   in the space: True   state after it: [0.6392936  0.76896274 0.33322716]
# array([1.5], dtype=float32)   in the space: True   state after it: the same
# array([1.5])   in the space: False  state after it: the same
# torques kept of 2,000: 0 and as float32 2000
