#!/usr/bin/env bash
# Gymnasium 1.4.0, DiscretizeAction: "uniformly discretizes a continuous Box action space". A
# discrete agent (DQN, discrete CQL) then learns on Pendulum-v1, whose torques go from -2 to 2 N m.
# Guess: bins=5 are the torques -2, -1, 0, 1, 2; more bins only add steps between the bounds.
# Truth: the middles of 5 equal parts: no bin count reaches a bound; the largest torque is
#   2 (1 - 1 / bins): 1 N m of 2 bins, 1.6 of 5, and no count that is even has a torque of 0.
#   Turned back by `revert_action`, the two bounds are the outermost bins: logged bang-bang torques
#   of 2 N m are replayed as 1 (2 bins) or 1.6 (5 bins), without a word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile gymnasium==1.4.0 numpy==2.4.6
"$folder/bin/python" - <<'END'
import gymnasium
import numpy as np
from gymnasium.wrappers import DiscretizeAction

print("gymnasium", gymnasium.__version__)
for bins in (2, 3, 5, 11):
    env = DiscretizeAction(gymnasium.make("Pendulum-v1"), bins=bins)
    torques = np.concatenate([env.action(index) for index in range(bins)])
    print(bins, "bins:", *np.round(torques, 2))
    assert abs(torques.max() - 2 * (1 - 1 / bins)) < 1e-2
    assert abs(torques.min() + torques.max()) < 1e-2
    assert (abs(torques).min() < 1e-6) == (bins % 2 == 1)

# What full torque does against what the outermost of 2 bins does, from the same start.
for bins, wanted in ((2, 1.0), (5, 1.6)):
    whole = gymnasium.make("Pendulum-v1")
    part = DiscretizeAction(gymnasium.make("Pendulum-v1"), bins=bins)
    whole.reset(seed=0)
    part.reset(seed=0)
    index = part.revert_action(np.array([2.0], np.float32))
    played = float(part.action(index)[0])
    speeds = [float(env.step(action)[0][2])
              for env, action in ((whole, np.array([2.0], np.float32)), (part, index))]
    print(f"logged 2.0 N m, {bins} bins: bin {index}, replayed {played:.1f} N m;",
          f"speed after a step {speeds[0]:.3f} and {speeds[1]:.3f} rad/s")
    assert abs(played - wanted) < 1e-3
    assert abs(speeds[0] - speeds[1] - 3 * (2 - wanted) * 0.05) < 1e-3
END
# Output:
# gymnasium 1.4.0
# 2 bins: -1.0 1.0
# 3 bins: -1.33 0.0 1.33
# 5 bins: -1.6 -0.8 0.0 0.8 1.6
# 11 bins: -1.82 -1.45 -1.09 -0.73 -0.36 0.0 0.36 0.73 1.09 1.45 1.82
# logged 2.0 N m, 2 bins: bin 1, replayed 1.0 N m; speed after a step 0.408 and 0.258 rad/s
# logged 2.0 N m, 5 bins: bin 4, replayed 1.6 N m; speed after a step 0.408 and 0.348 rad/s
