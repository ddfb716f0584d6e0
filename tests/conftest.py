"""Settings of every test process."""

from __future__ import annotations

import torch

# xdist already keeps every core busy; two torch threads in each worker only wait for one another (16 s became 41).
torch.set_num_threads(1)
