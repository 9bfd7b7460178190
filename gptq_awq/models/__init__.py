"""Causal language models: loading and offloading, their blocks, and the sites (linears that share an input) in them."""
