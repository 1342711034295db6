"""What a learned policy observes, as arrays of fixed length."""
