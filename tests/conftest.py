"""Settings that every test needs before a framework is imported."""

import os

SETTINGS = {
    "HF_HUB_OFFLINE": "1",  # timm builds models, and never downloads weights
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve the child processes on two cores
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # on a GPU, torch runs in the same process
}

for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
