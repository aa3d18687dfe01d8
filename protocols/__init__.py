"""What is said between services: values and contracts. Depends on the standard library, msgspec and numpy only."""
