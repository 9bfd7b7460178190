"""Metrics made of per-token quantities of both models: each is one file and one yaml in configs/eval/metric."""
