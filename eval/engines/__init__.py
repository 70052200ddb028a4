"""Who makes a cell's chunks, where one process is not enough: the ranks of a launcher, or the actors of a Ray cluster."""
