"""What the parts cost, measured: each benchmark prints its bound beside its result, and ratios within one run."""
