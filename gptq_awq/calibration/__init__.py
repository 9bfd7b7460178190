"""What solvers see of a layer: second moments of its inputs, gathered block by block from calibration text."""
