"""Low-bit weights: the grids, the packed bytes, and the layers, models and files made of them.

``config`` (plans, no torch), ``grid`` (ternary weights, 8-bit activations), ``groupwise`` (4 to 8 bits with a scale
per group of columns), ``pack`` (codes to bytes and back).
"""
