"""What several families are made of: ViT, triplanes, transformer layers, tables of PyTorch names."""
