"""What every stage shares: numpy and the standard library only.

Axes, wherever an array crosses a public border:

    E exits    N samples of a data set    B samples of a batch    C classes    H, W pixels

Exits are numbered from 1 in everything that a person or a client sees. One multiply-add is one MAC.
Pixels lie in [0, 1]. Scores are float64 and larger means surer.
"""
