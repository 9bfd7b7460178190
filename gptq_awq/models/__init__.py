"""Causal language models: loading, blocks, sites."""
