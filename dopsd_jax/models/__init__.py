"""Networks: one file each, with its size table and its table of PyTorch tensor names."""
