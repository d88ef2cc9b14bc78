"""The parts that all other folders are built of."""
