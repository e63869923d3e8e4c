#!/usr/bin/env bash
# TorchRL 0.14.1, GymEnv("Pendulum-v1", num_envs=2), over Gymnasium 1.4.0. VecGymEnvTransform: "the
# resulting data truly reflects the output of the step", "till the most recent gymnasium version",
# and NaN where the final state is lost.
# Guess: at the time limit the next state is the final one. Truth: it is (0, 0, 0), which is no
# state at all (cos^2 + sin^2 = 0), not terminated: the target asks for its value.
# Seen: next state at step 199 [0.0, 0.0, 0.0], truncated True, terminated False; 4 of 4 ends.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3 \
    gymnasium==1.4.0 numpy==2.4.6
cat > "$tmp/run.py" <<'EOF'
from importlib.metadata import version

import torch
from torchrl.envs import GymEnv


def main():
    print("torchrl", version("torchrl"), "gymnasium", version("gymnasium"))
    env = GymEnv("Pendulum-v1", num_envs=2)
    env.set_seed(0)
    rows = env.rollout(450, break_when_any_done=False)
    after = rows["next"]
    radius = after["observation"][..., :2].norm(dim=-1)                 # 1 for every angle
    for t in (198, 199, 200):
        print(t, "next state", [round(x, 2) for x in after["observation"][0, t].tolist()],
              "truncated", after["truncated"][0, t].item(),
              "terminated", after["terminated"][0, t].item())
    ends = after["truncated"][..., 0]
    print("truncated", int(ends.sum()), "of them zeros", int((radius[ends] == 0).sum()))
    assert ends.sum() == 4 and not after["terminated"].any()
    assert not after["observation"][ends].any()
    assert torch.allclose(radius[~ends], torch.tensor(1.0), atol=1e-3)
    env.close()


if __name__ == "__main__":
    main()
EOF
cd "$tmp"
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" run.py 2> "$tmp/err" | grep -v INFO \
    || { cat "$tmp/err"; exit 1; }
