#!/usr/bin/env bash
# skrl 2.1.1, GaussianMixin(clip_actions=True), as in its Pendulum example for SAC: "log_prob: log
# of the probability density function"; SAC takes minus its mean for the policy's entropy.
# It is the Gaussian's density at the clipped torque: no density of what is played, no tanh.
# Guess: near the Gaussian's entropy. Truth: a policy that always plays 2 N m has more "entropy"
# than a spread one, the more the farther its mean lies outside: SAC pays it to leave the limits.
# Seen: mean 0, sd 1: 1.38; mean 3, sd 0.1 (every torque is 2.0): 48.6; mean 10, sd 0.1: 3,199.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 skrl==2.1.1 gymnasium==1.4.0 \
    numpy==2.4.6
cd "$tmp"
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import math
from importlib.metadata import version

import gymnasium
import torch
from skrl.models.torch import GaussianMixin, Model


class Policy(GaussianMixin, Model):
    """Torques of one Gaussian in every state."""

    def __init__(self, env, mean, sd):
        Model.__init__(self, observation_space=env.observation_space,
                       action_space=env.action_space, device="cpu")
        GaussianMixin.__init__(self, clip_actions=True)
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.log_sd = math.log(sd)

    def compute(self, inputs, role=""):
        n = len(inputs["observations"])
        return self.mean.expand(n, 1), {"log_std": torch.full([n, 1], self.log_sd)}


print("skrl", version("skrl"), "torch", torch.__version__)
env = gymnasium.make("Pendulum-v1")
torch.manual_seed(0)
entropy, slope = {}, {}
for mean, sd in ((0.0, 1.0), (2.0, 1.0), (3.0, 0.1), (10.0, 0.1)):
    policy = Policy(env, mean, sd)
    torque, outputs = policy.act({"observations": torch.zeros(20000, 3)})
    loss = -outputs["log_prob"].mean()
    slope[mean], = torch.autograd.grad(loss, policy.mean)
    entropy[mean] = loss.item()
    print(f"mean {mean:4.1f} sd {sd}: torques {torque.min():5.2f} to {torque.max():4.2f}, minus "
          f"log_prob {entropy[mean]:7.2f}, its slope by the mean {slope[mean]:7.2f}")
    if mean > 2:
        assert (torque == 2).all()
assert 1.3 < entropy[0.0] < 1.5 and 1.0 < entropy[2.0] < 1.3
assert entropy[3.0] > 40 and entropy[10.0] > 3000 and slope[3.0] > 50
EOF
