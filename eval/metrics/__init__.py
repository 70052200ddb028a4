"""Distances between sets of images; each module names the paper of its formula."""
