"""The routes, one file a noun. They translate; services decide."""
