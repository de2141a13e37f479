"""Short meanings of the words in reports; `docs/concepts.md` holds the same ones under "Glossary"."""

from __future__ import annotations

import re
from collections.abc import Mapping

GLOSSARY: Mapping[str, str] = {
    "AUROC": "the probability that a correct answer has a higher score than a wrong one; 1 is perfect, 0.5 is chance",
    "budget": "the mean cost of an image that the thresholds were selected for",
    "ECE": "expected calibration error: the mean distance between confidence and accuracy; 0 is perfect",
    "efficacy": "how early images leave: 1 if all leave at exit 1, less the later they leave",
    "exit": "a classifier inside the network, at which an image can leave; exits are numbered from 1",
    "MACs": "multiply-adds, the cost of an image; 1M is a million. Papers call a million of them 1 MFLOP",
    "PGD": "projected gradient descent, an attack that changes the pixels step by step within a radius eps",
    "segment": "the layers between two exits, with the head of the later one; one ONNX file",
    "standard error": "how far a measured share is from the true one by chance, typically; twice as far is rare",
    "static network": "the network with its last exit alone, as one would run it without early exits",
    "unsure": "the answer below the reject threshold: the class is withheld",
    "worst": "an image counts as correct only if every attack on it failed",
}


def words_in(text: str) -> dict[str, str]:
    """The entries of the glossary whose words a text holds, singular or plural."""
    return {word: meaning for word, meaning in GLOSSARY.items() if re.search(rf"\b{word}s?\b", text)}
