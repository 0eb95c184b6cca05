"""Operations of the model that PyTorch does not have, or not as fast."""
