"""From traces to a stopper: examples, fitters, calibration, the blocks at which asking pays."""
