"""What every Python process of a rehearsal begins with: cuDNN, which nothing stands in for, is off."""

import torch

torch.backends.cudnn.enabled = False
