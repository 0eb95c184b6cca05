"""Operations of the model that PyTorch lacks, or that are faster here on a CPU."""
