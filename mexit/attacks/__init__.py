"""Adversarial attacks: PGD and its losses, attacks on several exits, on a deployed policy and on its speed."""
