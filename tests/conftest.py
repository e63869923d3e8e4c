import os
import pathlib
import random
import sys

os.environ["OMP_NUM_THREADS"] = "1"       # here and in every child: two runs do not fight
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
