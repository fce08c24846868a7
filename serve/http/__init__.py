"""The HTTP interface: who may call, the routes, downloads, and the page."""
