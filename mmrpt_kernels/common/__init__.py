"""Pieces that two or more operators share: argument checks, the lm head, autocast."""
