"""What the targets of a rewritten model offer, and whether a model keeps to it."""
