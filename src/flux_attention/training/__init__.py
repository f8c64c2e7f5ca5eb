"""Training a router on a frozen backbone. Sibling of `evaluation`: neither imports the other."""
