"""Bit allocation under a budget: sensitivities of linears to rounding, and the cheapest choice of bits that fits."""
