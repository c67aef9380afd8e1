"""How jobs get onto many machines: what a stage needs, what a site is, what is submitted to it."""
