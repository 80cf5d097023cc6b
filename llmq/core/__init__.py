"""The affine grid, bit packing and the quantized weight: pure functions on tensors."""
