"""Pictures of the steps that unrolling writes."""
