#!/usr/bin/env bash
# PyTorch 2.13.0, the usual SAC policy: Normal, TanhTransform(cache_size=1) ("one should use
# cache_size=1 when it comes to NaN/Inf"), AffineTransform(0, 2); asked for recorded torques.
# Its support calls 2.0 N m valid, which Pendulum data has wherever a torque was clipped.
# Guess: -inf, or an error. Truth: nan, and so is the mean of a batch; and the density of a sample
# depends on which tensor holds it, itself or its clone.
# Seen: support True, log_prob(2.0) nan, mean of 64 rows nan; sample 20.6, its clone nan (64 of 64).
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution


def policy(mean):
    """Torques in N m, as Pendulum takes them."""
    squash = [TanhTransform(cache_size=1), AffineTransform(0.0, 2.0, cache_size=1)]
    return TransformedDistribution(Normal(torch.full([64], mean), 1.0), squash, validate_args=True)


print("torch", torch.__version__)
torques = torch.linspace(-1.9, 1.9, 64)
torques[10] = 2.0                                           # one torque at the limit
density = policy(0.0).log_prob(torques)
print("valid:", policy(0.0).support.check(torques).all().item(), "density of 2.0:",
      density[10].item(), "mean of 64 rows:", density.mean().item())
assert policy(0.0).support.check(torques).all()
assert density.isnan().sum() == 1 and density[10].isnan() and density.mean().isnan()

torch.manual_seed(0)
far = policy(12.0)
sample = far.rsample()
itself, clone = far.log_prob(sample), far.log_prob(sample.clone())
print("mean 12: the sample's density", round(itself.mean().item(), 1), "its clone's, nan in",
      clone.isnan().sum().item(), "of 64")
assert torch.equal(sample, sample.clone()) and itself.isfinite().all() and clone.isnan().any()
EOF
