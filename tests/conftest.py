import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))    # the modules lie beside tests/, there is no package


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
