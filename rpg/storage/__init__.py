"""Local paths and URIs: locations, files written as a whole, locks, the cache of a node."""
