"""What a training step costs on a GPU, without one: `python -m benchmarks.ledger`.

The CUDA branch of `train` runs on fake tensors at the sizes of the recipes. Its operators, their FLOP and bytes, the
places where the host waits, and the memory at the peak are counted, not estimated; times are those counts divided by
the rates of machines.py, arithmetic on paper. What the counts leave out: scratch inside an operator (cuBLAS takes 32
MB), holes in the allocator's memory, caches, and whatever makes a kernel slower than its bytes and FLOP.
"""
