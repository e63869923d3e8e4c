#!/usr/bin/env bash
# SciPy 1.17.1, ndimage.uniform_filter1d(curve, 5): a moving mean, used to smooth learning curves.
# Guess: point i is the mean of the 5 values around i; a run that diverged for a moment (one value
#   of 1e20, inf or nan) spoils 5 points of its smoothed curve.
# Truth: it keeps a running sum, so all points behind it are spoilt: with the spike at 100, point
#   997 is -18.00 after 1e20 where its 5 values have mean -162.74, -162.80 after 1e16, nan after
#   inf or nan. pandas 3.1.1's rolling(5).mean() and numpy.convolve give -162.74 in all four.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet --no-compile scipy==1.17.1 numpy==2.4.6 pandas==3.1.1
"$folder/bin/python" - <<'END'
from importlib.metadata import version

import numpy as np
import pandas as pd
from scipy.ndimage import uniform_filter1d

print(*(f"{name} {version(name)}" for name in ("scipy", "pandas", "numpy")))
curve = np.random.default_rng(0).uniform(-200, -100, 1000)      # returns of Pendulum
print("the mean around point 997 is", curve[995:1000].mean().round(2))
for spike, least in ((1e6, 0), (1e16, 0.01), (1e20, 100), (np.inf, None), (np.nan, None)):
    diverged = curve.copy()
    diverged[100] = spike
    wanted = curve[995:1000].mean()
    smooth = uniform_filter1d(diverged, 5)
    rolling = pd.Series(diverged).rolling(5).mean()
    convolved = np.convolve(diverged, np.full(5, 0.2), "same")
    print(f"spike {spike:g}: uniform_filter1d {smooth[997]:.2f} pandas {rolling[999]:.2f}",
          f"convolve {convolved[997]:.2f}")
    assert abs(rolling[999] - wanted) < 1e-6 and abs(convolved[997] - wanted) < 1e-6
    if least is None:
        assert np.isnan(smooth[103:]).all()
    elif least:
        assert abs(smooth[997] - wanted) > least
    else:
        assert abs(smooth[997] - wanted) < 1e-6
END
# Output:
# scipy 1.17.1 pandas 3.1.1 numpy 2.4.6
# the mean around point 997 is -162.74
# spike 1e+06: uniform_filter1d -162.74 pandas -162.74 convolve -162.74
# spike 1e+16: uniform_filter1d -162.80 pandas -162.74 convolve -162.74
# spike 1e+20: uniform_filter1d -18.00 pandas -162.74 convolve -162.74
# spike inf: uniform_filter1d nan pandas -162.74 convolve -162.74
# spike nan: uniform_filter1d nan pandas -162.74 convolve -162.74
