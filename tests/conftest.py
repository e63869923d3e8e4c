import pytest
import torch

torch.set_num_threads(1)          # the tests' products are small, and two pytest runs side by side should not fight


@pytest.fixture(autouse=True)
def seeded():
    import random

    torch.manual_seed(0)
    random.seed(0)
