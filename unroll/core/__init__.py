"""What everything else is built of."""
