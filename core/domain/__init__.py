"""Pure values and rules: no I/O, no ORM, no clock."""
