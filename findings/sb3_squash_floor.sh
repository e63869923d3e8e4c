#!/usr/bin/env bash
# Stable-Baselines3 2.9.2, SquashedDiagGaussianDistribution ("followed by a squashing function
# (tanh)"), SAC's policy: its correction is log(1 - tanh^2 + 1e-6).
# Guess: within 0.1 of the density, and the entropy's gradient brings a far mean back. Truth: from
# a mean of 8 on the log density is too low by 1.5 and more, and its slope, 2, fades to 0.
# Seen: mean 5, 8, 10, 15: log density 7.13, 11.67, 12.35, 12.39 (right: 7.17, 13.17, 17.17, 27.17),
# slope 1.94, 0.77, 0.06, 0.00 (right: 2.00).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 stable-baselines3==2.9.2 \
    gymnasium==1.3.0 numpy==2.4.6
cd "$tmp"
OMP_NUM_THREADS=1 "$tmp/venv/bin/python" - <<'EOF'
import math
from importlib.metadata import version

import torch
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution

print("stable-baselines3", version("stable-baselines3"), "torch", torch.__version__)
found = {}
for where in (0.0, 5.0, 8.0, 10.0, 15.0):
    mean = torch.tensor(where, requires_grad=True)
    torch.manual_seed(0)
    distribution = SquashedDiagGaussianDistribution(1)
    _, log_prob = distribution.log_prob_from_params(mean.expand(20000, 1), torch.zeros(20000, 1))
    slope, = torch.autograd.grad(log_prob.mean(), mean, retain_graph=True)
    sample = distribution.gaussian_actions                              # before tanh, [20000, 1]
    right = torch.distributions.Normal(mean, 1.0).log_prob(sample)
    right = right - 2 * (math.log(2) - sample - torch.nn.functional.softplus(-2 * sample))
    right_slope, = torch.autograd.grad(right.mean(), mean)
    found[where] = right.mean().item() - log_prob.mean().item(), slope.item()
    print(f"mean {where:4.1f}: log density {log_prob.mean():6.2f}, right {right.mean():6.2f}; "
          f"slope {slope:5.2f}, right {right_slope:5.2f}")
    assert abs(right_slope.item() - 2 * math.tanh(where)) < 0.1
assert abs(found[0.0][0]) < 0.01 and found[10.0][0] > 4 and found[15.0][0] > 14
assert found[10.0][1] < 0.2 and found[15.0][1] == 0
EOF
