"""Student or teacher: what a request is, what it is near to, and the bundle that says what is good enough."""
