"""Hashes of runs, by the names under which the stages of a run import them (see `gptq_awq.runtime.fingerprint`)."""

from gptq_awq.runtime.fingerprint import config_sha256, environment

__all__ = ["config_sha256", "environment"]
