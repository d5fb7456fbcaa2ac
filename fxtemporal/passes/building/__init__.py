"""Graph-building code that several passes share."""
