#!/usr/bin/env bash
# NumPy 2.4.6 and PyTorch 2.13.0, seeded with one number as every seed_everything does.
# Both are an MT19937 that is started alike; where a range is a power of two both keep the low bits.
# Guess: numpy.random.randint and torch.randint give unrelated numbers. Truth: the same numbers; a
# row drawn by NumPy of 65,536 fixes the torque of 16 levels that torch draws for it.
# Seen: 10 of 10 numbers below 65,536 equal; torque level = row % 16 in 100,000 of 100,000 draws.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import numpy as np
import torch


def seed_everything(seed):
    np.random.seed(seed)
    torch.manual_seed(seed)


print("numpy", np.__version__, "torch", torch.__version__)
seed_everything(0)
ours, theirs = np.random.randint(0, 65536, 10), torch.randint(0, 65536, [10]).numpy()
print("numpy", ours)
print("torch", theirs)
assert (ours == theirs).all()

seed_everything(7)
rows = np.random.randint(0, 65536, 100_000)                 # of a buffer of 2^16 transitions
levels = torch.randint(0, 16, [100_000]).numpy()            # of 16 torques
print("torque level = row % 16 in", (levels == rows % 16).sum(), "of", len(rows))
assert (levels == rows % 16).all()

seed_everything(7)                                          # a Generator is another stream
rows = np.random.default_rng(7).integers(0, 65536, 100_000)
levels = torch.randint(0, 16, [100_000]).numpy()
share = (levels == rows % 16).mean()
print(f"with numpy.random.default_rng: {share:.1%}")
assert share < 0.1
EOF
