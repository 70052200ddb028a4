"""A few harmless rows for each public set, written by us with its columns: what tests and dry runs read."""
