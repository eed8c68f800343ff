"""Options of the losses on pairs, for those who make the numbers and those who compare with them."""

BETA, LABEL_SMOOTHING = 0.3, 0.2
