"""Bits for each linear under a budget: what rounding costs, and the cheapest choice that fits."""
