"""Calibration: selects thresholds from traces. Uses numpy only and never runs a network."""
