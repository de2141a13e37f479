"""Calibration: traces in, thresholds out. numpy only; a network is never run here."""
