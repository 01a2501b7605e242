"""Formats of the neighbours, each in a module of its own that writes a folder and reads it back into ours.

    saelens.py           SAELens 6: sae_weights.safetensors + cfg.json
    gemma_scope.py       Gemma Scope: params.npz
    gemma_scope_2.py     Gemma Scope 2: params.safetensors + config.json
    circuit_tracer.py    circuit-tracer transcoder set: layer_*.safetensors + config.yaml

All are JumpReLU (or ReLU: threshold 0) with acts = relu(x @ W_enc + b_enc) where that is > threshold, and
y_hat = acts @ W_dec + b_dec (+ x @ W_skip); b_dec is never subtracted from the input. No neighbour is imported, and
nothing is unpickled.
"""

from __future__ import annotations
