"""Calibration: the second moments of each linear's input, gathered block by block from calibration text."""
