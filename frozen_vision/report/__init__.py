"""The report card of backbones: every task, the same budget, seeds, intervals, one page."""
