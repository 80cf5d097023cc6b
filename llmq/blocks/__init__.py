"""Running one decoder block: its inputs captured, its forward replayed, its linears grouped by input, their statistics."""
