"""Training: settings, presets, training methods, the loop, checkpoints and regularizers."""
