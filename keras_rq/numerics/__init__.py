"""Pure tensor functions: grids, blocks, ranges, dequantizers, sparsity, rotations, storage."""
