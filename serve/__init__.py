"""The service: generators on Ray Serve, and generation jobs that survive whatever is killed."""
