"""What a run will do before it runs: simulation, calibration, automatic placement, and advice after a run."""
