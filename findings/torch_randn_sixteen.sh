#!/usr/bin/env bash
# PyTorch 2.13.0, torch.randn after manual_seed: "a tensor filled with random numbers"; one takes a
# larger batch to have the smaller one's noise, and more.
# Guess: randn(16) begins with randn(15), randn(20) with randn(16). Truth: below 16 it draws one by
# one, from 16 on in another way, and of a rest it redraws the last 16: one more state in a batch
# changes the noise of 15 others. uniform_ does not.
# Seen: equal: (15) and (16): 0 of 15; (16) and (17): 1 of 16; (64) and (65): 49 of 64.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6
"$tmp/venv/bin/python" - <<'EOF'
import torch


def same(draw, small, large):
    """How many of the first numbers of two sizes of draw agree."""
    torch.manual_seed(0)
    few = draw(small)
    torch.manual_seed(0)
    return int(torch.isclose(few, draw(large)[:small], atol=1e-5).sum())


print("torch", torch.__version__)
sizes = (15, 16), (16, 17), (16, 20), (64, 65), (16, 32)
normal = [same(torch.randn, *pair) for pair in sizes]
uniform = [same(torch.rand, *pair) for pair in sizes]
for pair, n, u in zip(sizes, normal, uniform):
    print(f"sizes {pair}: normal {n} of {pair[0]} the same, uniform {u} of {pair[0]}")
assert normal == [0, 1, 4, 49, 16] and uniform == [15, 16, 16, 64, 16]

torch.manual_seed(0)
two = torch.cat([torch.randn(8), torch.randn(8)])
torch.manual_seed(0)
equal = int(torch.isclose(two, torch.randn(16), atol=1e-5).sum())
print("two draws of 8 and one of 16:", equal, "of 16 the same")
assert equal == 0
EOF
