"""Evaluation of a run or a bundle: accuracy, cost and robustness under attack."""
