#!/usr/bin/env bash
# PyTorch 2.13.0, torch.set_flush_denormal(True): "disables denormal floating numbers on CPU".
# Guess: in all of torch, and in torch alone. Truth: for the thread that calls it and those that it
# begins later; torch's own pool, if it has worked before, goes on with them; and Python and NumPy
# lose them in the calling thread, without a word.
# Seen: 750,000 of 1,000,000 products on 4 threads stay denormal; 5e-324 == 0.0 is True and
# float("1e-310") is 0.0.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import numpy as np
import torch

print("torch", torch.__version__, "numpy", np.__version__)
torch.set_num_threads(4)
small = torch.full([1_000_000], 1e-38)                      # times 0.1 is denormal in float32
before = int((small * 0.1 != 0).sum())
numbers = np.array([0.0, 1e-310, 5e-324])
assert before == 1_000_000 and len(np.unique(numbers)) == 3 and float("1e-310") > 0
if not torch.set_flush_denormal(True):
    raise SystemExit("this processor cannot flush denormals")
after = int((small * 0.1 != 0).sum())
print("denormal products that survive:", before, "before,", after, "after")
print("Python: 5e-324 == 0.0 is", float("5e-324") == 0.0, "float('1e-310') is", float("1e-310"))
print("NumPy: different numbers among 0, 1e-310, 5e-324:", len(np.unique(numbers)))
assert 0 < after < before
assert float("5e-324") == 0.0 and len(np.unique(numbers)) == 1
torch.set_num_threads(1)
alone = int((small * 0.1 != 0).sum())
print("on one thread:", alone)
assert alone == 0
EOF
