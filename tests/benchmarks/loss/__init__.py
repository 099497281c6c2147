"""Forward and backward of the completion loss against other implementations, on the same tensors."""
