"""The routes, one file a noun. They translate between the wire and the services, which decide."""
