"""Values and rules without I/O, ORM or clock."""
