"""A classifier with everything that belongs to it: preprocessing, forward passes, head, loading."""
