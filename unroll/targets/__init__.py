"""Tables of what the targets of a rewritten model offer, and a check that a model keeps to them."""
