"""Finds what is wrong with a labeled set of pictures, from its features: copies, wrong labels, odd pictures."""
