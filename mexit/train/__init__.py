"""Training: networks, attacks, objectives, the loop. torch lives here (and in export)."""
