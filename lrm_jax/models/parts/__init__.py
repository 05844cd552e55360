"""Parts that the families share: ViT, triplanes, transformer layers, tables of PyTorch names."""
